"""Quantization of weights, activations and the key-value cache."""
