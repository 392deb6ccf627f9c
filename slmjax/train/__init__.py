"""Step, loop, hooks, checkpoints, sharding: they know arrays and values, no family, loss or quantizer."""
