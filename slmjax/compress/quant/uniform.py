"""Quantizers whose scale is computed from the weights at each step: absmax, asymmetric, BitNet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp

from slmjax.compress.quant.blocks import Blocks, Granularity, PerTensor
from slmjax.compress.quant.grids import Everywhere, Grid, Nearest, units
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.errors import UserError


def check_bits(bits: int, least: int = 2) -> None:
    """
    Raises:
        UserError: the quantizer has no such number of bits.
    """
    if not least <= bits <= 8:
        raise UserError(f"bits is {bits}; this quantizer has {least} to 8")


@dataclass(frozen=True, kw_only=True)
class Symmetric(Quantizer):
    """`s clip(round(w / s), -2^(b-1), 2^(b-1) - 1)` with s from the largest weight of each block."""

    bits: int = 4
    fill: bool = False
    """s = absmax / (2^(b-1) - 1/2), which also uses the outer half of the last step; else absmax / (2^(b-1) - 1)"""

    def __post_init__(self):
        check_bits(self.bits)

    @property
    def grid(self) -> Grid:
        return Nearest(low=-(2 ** (self.bits - 1)), high=2 ** (self.bits - 1) - 1)

    def base(self, w: Any, blocks: Blocks) -> Any:
        reach = 2 ** (self.bits - 1) - (0.5 if self.fill else 1.0)
        return jnp.max(jnp.abs(w), axis=blocks.over, keepdims=True) * (1 / reach)


@dataclass(frozen=True, kw_only=True)
class Asymmetric(Quantizer):
    """`s (clip(round(w / s) + z, 0, 2^b - 1) - z)`, s = (max - min) / (2^b - 1), z = round(-min / s). The range is
    extended to contain 0."""

    bits: int = 4
    shifts: ClassVar[bool] = True

    def __post_init__(self):
        check_bits(self.bits, least=1)

    @property
    def grid(self) -> Grid:
        return Nearest(low=0, high=2**self.bits - 1)

    def base(self, w: Any, blocks: Blocks) -> Any:
        low, high = _range(w, blocks)
        return (high - low) * (1 / (2**self.bits - 1))

    def zero(self, w: Any, step: Any, blocks: Blocks) -> Any:
        low, _ = _range(w, blocks)
        return jnp.clip(jnp.round(units(-low, step)), 0, 2**self.bits - 1)


def _range(w: Any, blocks: Blocks) -> tuple[Any, Any]:
    """The smallest and the largest weight of each block, the range extended to 0."""
    low = jnp.minimum(jnp.min(w, axis=blocks.over, keepdims=True), 0.0)
    return low, jnp.maximum(jnp.max(w, axis=blocks.over, keepdims=True), 0.0)


@dataclass(frozen=True, kw_only=True)
class BitNet(Quantizer):
    """BitNet b1.58: -s, 0 or s by `s clip(round(w / s), -1, 1)`, s the mean |w| of a matrix; gradients pass everywhere.

    With activations in 8 bits (`numerics=Numerics(product=RoundedInputs())`) as in the paper.

    References:
        Ma et al. 2024, arXiv:2402.17764
    """

    granularity: Granularity = field(default_factory=PerTensor)
    eps: float = 1e-5

    @property
    def grid(self) -> Grid:
        return Everywhere(low=-1, high=1)

    def base(self, w: Any, blocks: Blocks) -> Any:
        return ordered_mean(jnp.abs(w), blocks.over) + self.eps


def ordered_mean(x: Any, over: tuple[int, ...]) -> Any:
    """The mean over some dimensions, which are kept with size 1: of halves, quarters and so on.

    `jnp.mean` adds in another order in another program, so the scale of an export would not be that of training to the
    last bit.
    """
    x = jnp.moveaxis(x, over, tuple(range(len(over))))
    kept = x.shape[len(over) :]
    x = x.reshape(-1, *kept)
    count = len(x)
    x = jnp.pad(x, ((0, 2 ** (count - 1).bit_length() - count), *((0, 0),) * len(kept)))
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return jnp.expand_dims(x[0], over) * (1 / count)
