"""Where commands run: in several processes of this machine, or on a cluster. Without jax."""
