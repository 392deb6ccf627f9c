"""Quantizers to floating point numbers of 4 bits (E2M1): MXFP4 and NVFP4.

A code is twice the number, an integer, and a step half the scale that a file holds: so values, packing and files are
those of the other grids.

References:
    OCP Microscaling Formats (MX) Specification v1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from slmjax.compress.quant.blocks import Blocks, Granularity, PerGroup
from slmjax.compress.quant.grids import Grid, ScaleType
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.errors import UserError

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the numbers of E2M1, by their bits without the sign: 0, 0.5, 1, 1.5, 2, 3, 4, 6"""
LARGEST = 6.0
"""The largest number of E2M1"""
LARGEST_E4M3, NORMAL_E4M3, SMALLEST_E4M3 = 448.0, 2.0**-6, 2.0**-9
"""Of float8_e4m3fn: the largest number, the smallest normal one, the smallest"""
LEAST = 2.0**-100
"""The smallest scale: products with it are still normal numbers of bfloat16 and float32, which no program makes 0"""

Exponent = Literal["floor", "even", "ceil"]


@dataclass(frozen=True, kw_only=True)
class Float4(Grid):
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, each as a code twice as large. The nearest value, of two
    the one whose last bit is 0. Gradients pass wherever the rounded value is not clipped."""

    low: int = -12
    high: int = 12

    @property
    def levels(self) -> int:
        return 2 * len(MAGNITUDES) - 1

    @property
    def codes(self) -> tuple[int, ...]:
        return (*(-x for x in MAGNITUDES[:0:-1]), *MAGNITUDES)

    def numbered(self, number: Any) -> Any:
        signed = number.astype(jnp.int32) - (len(MAGNITUDES) - 1)
        bits = jnp.abs(signed)  # two of exponent, one of mantissa
        size = jnp.where(bits < 2, bits, (2 + (bits & 1)) << jnp.maximum((bits >> 1) - 1, 0))
        return jnp.where(signed < 0, -size, size).astype(jnp.float32)

    def encode(self, v: Any) -> Any:
        size = jnp.abs(v)
        apart = jnp.where(size < 4, 1.0, jnp.where(size < 8, 2.0, 4.0))  # neighbouring codes
        code = jnp.minimum(apart * jnp.round(size * (1 / apart)), self.high)
        return jnp.where((v < 0) & (code > 0), -code, code)  # a zero without a sign, as codes have none

    def passes(self, v: Any) -> Any:
        return jnp.abs(v) < 14  # from here on, a format with larger numbers would round to 16


def e4m3(x: Any) -> Any:
    """x >= 0 -> the nearest positive float8_e4m3fn, as float32: at least 2^-9, at most 448."""
    normal = jax.lax.reduce_precision(x, 8, 3)
    rounded = jnp.where(x < NORMAL_E4M3, jnp.round(x * (1 / SMALLEST_E4M3)) * SMALLEST_E4M3, normal)
    return jnp.clip(rounded, SMALLEST_E4M3, LARGEST_E4M3)


def power_of_two(x: Any, add: int = 0) -> Any:
    """x > 0, float32 -> the largest power of two that is not larger, at least `LEAST`. By its bits, which gives the
    same in every program.

    Args:
        add: to the 23 bits of the mantissa first: 2^23 - 1 gives the smallest power of two that is not smaller.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    floor = jax.lax.bitcast_convert_type((bits + add) & 0x7F800000, jnp.float32)
    return jnp.maximum(floor, LEAST)


def _absmax(w: Any, blocks: Blocks) -> Any:
    return jnp.max(jnp.abs(w), axis=blocks.over, keepdims=True)


def _check(name: str, quantizer: Quantizer, size: int, scale: str) -> None:
    """
    Raises:
        UserError: the blocks or the type of the scales are others than those of the format.
    """
    if quantizer.granularity != PerGroup(size=size):
        raise UserError(
            f"granularity is {quantizer.granularity}, but {name} has a scale for each {size} input channels; leave "
            "granularity out"
        )
    if quantizer.scale_type != "float32":
        raise UserError(f"scale_type is {quantizer.scale_type!r}, but {name} has scales of {scale}; leave it out")


@dataclass(frozen=True, kw_only=True)
class MXFP4(Quantizer):
    """MXFP4: E2M1 numbers, each 32 input channels with a power of two as scale (E8M0). 4.25 bits a weight.

    The scale is `2^(floor(log2 absmax) - 2)`, so that a largest weight between 7 and 8 scales is clipped to 6; see
    `exponent`.

    References:
        OCP Microscaling Formats (MX) Specification v1.0, section 6.3
    """

    granularity: Granularity = field(default_factory=lambda: PerGroup(size=32))
    scale_type: ScaleType = "float32"
    """Not a choice here: the scales are powers of two"""
    exponent: Exponent = "floor"
    """floor: as in the specification. even: twice that where the largest weight would be clipped by more than rounding
    (7 scales and more), as compressed-tensors does. ceil: the smallest scale that clips nothing (arXiv:2506.08027)"""

    def __post_init__(self):
        _check("MXFP4", self, 32, "E8M0 (powers of two)")

    @property
    def grid(self) -> Grid:
        return Float4()

    def base(self, w: Any, blocks: Blocks) -> Any:
        # a power of two p and a mantissa m: p m is at most 7 / 4 p (exclusive), or 6 / 4 p (inclusive)
        add = {"floor": 0, "even": 2**21, "ceil": 2**22 - 1}[self.exponent]
        return power_of_two(_absmax(w, blocks), add) * 0.125

    def store(self, step: Any, blocks: Blocks) -> Any:
        return power_of_two(step)


@dataclass(frozen=True, kw_only=True)
class NVFP4(Quantizer):
    """NVFP4: E2M1 numbers, each 16 input channels with a scale of 8 bits (E4M3), the matrix with one of float32. 4.5
    bits a weight.

    The scale of a block is `absmax / 6`, in units of the matrix's scale. That is the smallest power of two with which
    no scale of a block exceeds 448, the largest number of E4M3 (NVIDIA and compressed-tensors take the largest weight
    over 6 * 448 itself, which is smaller, by less than half). A power of two, because then a value is exact in
    bfloat16, in which compressed-tensors unpacks it, and the same whether a runtime multiplies by the matrix's scale
    (llama.cpp), divides by its inverse (compressed-tensors), or does so after the product with the activations.

    References:
        NVIDIA 2025, Pretraining Large Language Models with NVFP4, arXiv:2509.25149
    """

    granularity: Granularity = field(default_factory=lambda: PerGroup(size=16))
    scale_type: ScaleType = "float32"
    """Not a choice here: the scales of the blocks are E4M3"""
    of_matrix: ClassVar[bool] = True

    def __post_init__(self):
        _check("NVFP4", self, 16, "E4M3")

    @property
    def grid(self) -> Grid:
        return Float4()

    def base(self, w: Any, blocks: Blocks) -> Any:
        return _absmax(w, blocks) * (0.5 / LARGEST)

    def store(self, step: Any, blocks: Blocks) -> Any:
        kept = tuple(i for i in range(step.ndim) if i not in blocks.stacked)
        largest = jnp.max(step, axis=kept, keepdims=True)
        half = power_of_two(largest * (1 / LARGEST_E4M3), 2**23 - 1)  # of the matrix's scale
        return e4m3(step * (1 / half)) * half


def scale_of_matrix(steps: Any) -> float | None:
    """The smallest power of two in whose units all steps of a matrix (`Codes.steps`) are half a float8_e4m3fn; None if
    there is none."""
    scales = 2 * np.asarray(steps, np.float32)
    largest = float(scales.max())
    if not (largest > 0 and np.isfinite(largest)):
        return None
    mantissa, exponent = np.frexp(np.float32(largest / LARGEST_E4M3))
    scale = np.ldexp(np.float32(1), exponent - 1 if mantissa == 0.5 else exponent)
    units = scales / scale
    exact = units.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) == units
    return float(scale) if bool((exact & (units > 0)).all()) else None
