"""Text to batches: sources, cleaning, tokenizer, token store, packing, mixture, loader. Imports no jax."""
