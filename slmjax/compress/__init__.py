"""Compression: quantization, pruning. Views and numerics; the training step knows none of them."""
