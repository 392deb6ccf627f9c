"""Layers as Linen modules, one idea a file."""
