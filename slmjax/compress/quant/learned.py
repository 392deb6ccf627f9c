"""Quantizers with learned scales: LSQ, SEQ, balanced 2-bit with learned clipping, binary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.grids import Clipped, Floor, Grid, Sign, Stretched, decode, units
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import check_bits
from slmjax.errors import UserError


def _mean(w: Any, blocks: Blocks) -> Any:
    """Mean |w| of each block, of shape `blocks.scales`."""
    return jnp.mean(jnp.abs(w), axis=blocks.over)


@dataclass(frozen=True, kw_only=True)
class LSQ(Quantizer):
    """Symmetric with a learned step, from `2 mean|w| / sqrt(Qp)` on, its gradient scaled by `1 / sqrt(N Qp)`.

    References:
        Esser et al. 2020, arXiv:1902.08153
    """

    bits: int = 4
    learned: ClassVar[bool] = True

    def __post_init__(self):
        check_bits(self.bits)

    @property
    def grid(self) -> Grid:
        return Clipped(low=-(2 ** (self.bits - 1)), high=2 ** (self.bits - 1) - 1)

    def reference(self, w: Any, blocks: Blocks) -> Any:
        return 2 * _mean(w, blocks) / math.sqrt(self.grid.high) + 1e-8

    def sensitivity(self, blocks: Blocks) -> float:
        return 1 / math.sqrt(blocks.size * self.grid.high)


@dataclass(frozen=True, kw_only=True)
class SEQ(Quantizer):
    """Stretched elastic quantization: `levels` values spread evenly over (-alpha, alpha), none at the ends. The step is
    `2 alpha / levels`, alpha learned from max|w| on.

    Four levels: +-alpha/4, +-3/4 alpha. Three (ternary): 0, +-2/3 alpha. In the ternary case, the reference code of the
    paper gives clipped weights the gradient +-1 in alpha, where their value is +-2/3 alpha; here it is +-2/3.

    References:
        Liu et al. 2025 (ParetoQ), arXiv:2502.02631
    """

    levels: int = 4
    learned: ClassVar[bool] = True

    def __post_init__(self):
        if not 3 <= self.levels <= 256:
            raise UserError(f"levels is {self.levels}; expected 3 (ternary), 4 (2 bits), or up to 256")

    @property
    def grid(self) -> Grid:
        low = -(self.levels // 2)
        return Stretched(low=low, high=low + self.levels - 1, offset=0.0 if self.levels % 2 else 0.5)

    def reference(self, w: Any, blocks: Blocks) -> Any:
        return 2 * jnp.max(jnp.abs(w), axis=blocks.over) / self.levels + 1e-8

    def sensitivity(self, blocks: Blocks) -> float:
        return 1 / math.sqrt(blocks.size)


@dataclass(frozen=True, kw_only=True)
class Balanced(Quantizer):
    """Balanced 2-bit with learned clipping: +-s/2, +-3/2 s with `s = f max|w| / 2`. f is learned; it begins where the
    squared error of the weights is smallest.

    References:
        Apple 2025, arXiv:2507.13575
    """

    learned: ClassVar[bool] = True
    candidates: int = 40
    """Values of f from 1 down to 1/candidates that are compared at the beginning"""

    @property
    def grid(self) -> Grid:
        return Floor(low=-2, high=1)

    def base(self, w: Any, blocks: Blocks) -> Any:
        return jnp.max(jnp.abs(w), axis=blocks.over, keepdims=True) / 2

    def reference(self, w: Any, blocks: Blocks) -> Any:
        base, grid = jnp.maximum(self.base(w, blocks), 1e-8), self.grid

        def error(f: Any) -> Any:
            value = decode(grid.encode(units(w, f * base)), f * base, None, grid.offset)
            return jnp.sum(jnp.square(value - w), axis=blocks.over)

        factors = jnp.arange(1, self.candidates + 1, dtype=w.dtype) / self.candidates
        errors = jax.lax.map(error, factors)
        return factors[jnp.argmin(errors, axis=0)]

    def sensitivity(self, blocks: Blocks) -> float:
        return 1 / math.sqrt(blocks.size)


@dataclass(frozen=True, kw_only=True)
class Binary(Quantizer):
    """`alpha sign(w)`, alpha learned from mean|w| on. The step is 2 alpha.

    References:
        Rastegari et al. 2016, arXiv:1603.05279; the learned scale as in ParetoQ, arXiv:2502.02631
    """

    learned: ClassVar[bool] = True

    @property
    def grid(self) -> Grid:
        return Sign()

    def reference(self, w: Any, blocks: Blocks) -> Any:
        return 2 * _mean(w, blocks) + 1e-8

    def sensitivity(self, blocks: Blocks) -> float:
        return 1 / math.sqrt(blocks.size)
