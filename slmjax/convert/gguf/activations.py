"""Activations as llama.cpp rounds them: to 8 bits in blocks for a product with packed weights, else to 16 bits or not.

With weights that are exact, this is what llama.cpp's probabilities differ by from those of float32; on a real model it
is more than the limit for an error. So an export is compared with our own forward pass with the same rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.quant.blocks import sides
from slmjax.compress.quant.grids import EXPONENT_MANTISSA
from slmjax.compress.quant.view import Packed
from slmjax.convert.gguf.carriers import carrier_of
from slmjax.convert.packed import PackedTensor, kind_of
from slmjax.nn.numerics import Numerics, Product

SMALL, LARGE = 32, 256
"""Activations that share a scale: 256 for a product with weights in blocks of 256, else 32"""


@dataclass(frozen=True, kw_only=True)
class BlockProduct(Product):
    """Products whose activations are rounded as llama.cpp rounds them."""

    blocks: tuple[tuple[str, int], ...]
    """(path of a packed parameter, activations that share a scale)"""
    dtype: str = "float32"
    """Of the other matrices, as `--dtype` names it"""

    def __call__(self, path: str, equation: str, x: jax.Array, weight: jax.Array, einsum: Callable) -> jax.Array:
        inputs, outputs = equation.split(",")[0], equation.split("->")[1]
        width = math.prod(x.shape[-sum(letter not in outputs for letter in inputs) :])  # summed over, and last
        block = dict(self.blocks).get(path, SMALL if self.dtype == "q8_0" and width % SMALL == 0 else 0)
        if block:
            x = in_blocks(x, width, block)
        elif self.dtype != "float32":
            x = jax.lax.reduce_precision(x, *EXPONENT_MANTISSA["bfloat16" if self.dtype == "bfloat16" else "float16"])
        return einsum(equation, x, weight)


def in_blocks(x: jax.Array, width: int, block: int) -> jax.Array:
    """x rounded to 8 bits, with a scale for each `block` of its last dimensions, which have `width` values together."""
    cut = x.reshape(-1, width // block, block)
    step = jnp.max(jnp.abs(cut), axis=-1, keepdims=True) / 127
    codes = jnp.round(cut / jnp.where(step > 0, step, 1))
    stored = jax.lax.reduce_precision(step, *EXPONENT_MANTISSA["float16"]) if block == SMALL else step
    return (codes * stored).reshape(x.shape)


def rounding(packed: Mapping[str, Packed], dtype: str) -> Numerics:
    """How llama.cpp computes with the file of a quantized model."""
    blocks = tuple((path, LARGE if _block(path, one) == LARGE else SMALL) for path, one in packed.items())
    return Numerics(product=BlockProduct(blocks=blocks, dtype=dtype))


def _block(path: str, packed: Packed) -> int:
    """The weights in a block of the type that holds a parameter."""
    kind, inputs = kind_of(packed), sides(packed.axes, path).inputs
    width = math.prod(packed.blocks.shape[i] for i in inputs)
    groups = 1 if kind.group is None else width // kind.group
    zeros = np.zeros((1, groups), np.int16) if kind.zeros else None
    row = PackedTensor(np.zeros((1, width), np.int16), np.ones((1, groups), np.float32), zeros, kind.grid)
    return carrier_of(path, row).format.block
