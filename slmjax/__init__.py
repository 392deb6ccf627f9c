"""slmjax: train, compress and export small language models from scratch in JAX."""

__version__ = "0.1.0"
