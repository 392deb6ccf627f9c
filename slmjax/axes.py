"""The names that the dimensions of parameters have: what is split over devices, and what makes up one matrix.

A parameter declares a name, or None, for each of its dimensions (`Layer.matrix`). The optimizer and the placement on
devices read nothing else of it.
"""

from __future__ import annotations

STACKED = ("layers", "experts")
"""Axes whose every entry has a matrix of its own. They come first"""
APART = ("vocab", "context", "type", "tap", "block")
"""Axes whose entries are not columns of one matrix: rows that are looked up, what a convolution has for each channel,
and the scales of quantized weights"""
KNOWN = {
    "layers": "the layers of a stage, stacked",
    "experts": "the experts of a mixture, stacked",
    "vocab": "tokens of the vocabulary",
    "context": "positions",
    "type": "token types",
    "tap": "taps of a convolution",
    "block": "groups of input channels that share a quantization scale",
    "embed": "channels of the residual stream",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "channels of a head; together with the heads before it, one side of a matrix",
    "mlp": "hidden channels of a feed-forward layer or of a convolution",
}
"""Every name, and what its entries are; a dimension that is none of these has None"""
