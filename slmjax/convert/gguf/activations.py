"""Activations as llama.cpp rounds them: to 8 bits in blocks for a product with packed weights, else to 16 bits or not.

With weights that are exact, this is why llama.cpp's probabilities differ from ours. How much it costs depends on the
model, so it is computed and an export is held to it.
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
    largest = jnp.max(jnp.abs(cut), axis=-1, keepdims=True)
    step, codes = largest / 127, jnp.round(cut * (127 / jnp.where(largest > 0, largest, 1)))
    return (codes * (half(step) if block == SMALL else step)).reshape(x.shape)


def half(x: jax.Array) -> jax.Array:
    """x > 0 rounded to float16, subnormal values included, which `reduce_precision` makes 0."""
    return jnp.where(x < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, jax.lax.reduce_precision(x, 5, 10))


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
