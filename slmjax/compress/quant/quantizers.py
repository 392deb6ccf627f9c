"""Quantizers of weights: which grid, which scale, and whether the scale is learned.

A learned step is `(1 + own) * reference * base`: `own` is trained and starts at 0, `reference` is measured on the
weights when quantization begins, `base` is computed from the current weights (1 unless the quantizer has one). So a
learning rate means the same for scales of any size, and a scale is computed to the same bits in every program (an
exponential would not be).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.compress.quant.blocks import Blocks, Granularity, PerChannel
from slmjax.compress.quant.grids import (
    Codes,
    Grid,
    ScaleType,
    encode,
    rounded,
    stored,
)

LEAST = 2.0**-6
"""The smallest factor `1 + own`: a scale stays positive"""


@dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """How a weight is rounded. All arrays are float32."""

    granularity: Granularity = field(default_factory=PerChannel)
    """Which weights share a scale"""
    scale_type: ScaleType = "float16"
    """Type in which an export stores the scales; they are rounded to it in training too, so that the export is exact"""

    learned = False
    """Whether the scales are trained"""
    shifts = False
    """Whether there are zero points"""
    of_matrix = False
    """Whether steps are stored in units that follow from the largest step of the whole matrix"""

    @property
    @abc.abstractmethod
    def grid(self) -> Grid:
        """The values, in units of the step."""

    def reference(self, w: Any, blocks: Blocks) -> Any:
        """Blocked weights -> the step that a learned scale starts from, in units of `base`, of shape
        `blocks.scales`."""
        return jnp.ones(blocks.scales, jnp.float32)

    def base(self, w: Any, blocks: Blocks) -> Any:
        """The part of the step that follows the current weights, of shape `blocks.broadcast`. Not differentiated."""
        return jnp.float32(1)

    def zero(self, w: Any, step: Any, blocks: Blocks) -> Any:
        """The zero point, of shape `blocks.broadcast`; None for a symmetric grid."""
        return None

    def sensitivity(self, blocks: Blocks) -> float:
        """Factor on the gradient of a learned scale."""
        return 1.0

    def store(self, step: Any, blocks: Blocks) -> Any:
        """Steps, of shape `blocks.broadcast`, as they are stored: rounded to the type of the scales."""
        return stored(step, self.scale_type)

    def step(self, w: Any, blocks: Blocks, own: Any, reference: Any) -> Any:
        """The step, of shape `blocks.broadcast`, as it is stored.

        Args:
            own, reference: of shape `blocks.scales`; None for a scale that is not learned.
        """
        base = jax.lax.stop_gradient(self.base(w, blocks))
        if own is None:
            return self.store(base, blocks)
        factor = jnp.maximum(1 + _scaled_gradient(own, self.sensitivity(blocks)), LEAST) * reference
        return self.store(factor.reshape(blocks.broadcast) * base, blocks)

    def fake(self, w: Any, blocks: Blocks, own: Any = None, reference: Any = None) -> Any:
        """A weight -> its rounded values, differentiable in the weight and in `own`."""
        blocked = w.astype(jnp.float32).reshape(blocks.blocked)
        step = self.step(blocked, blocks, own, reference)
        zero = self.zero(jax.lax.stop_gradient(blocked), jax.lax.stop_gradient(step), blocks)
        return rounded(self.grid, blocked, step, zero, blocks.over).reshape(blocks.shape).astype(w.dtype)

    def pack(self, w: Any, blocks: Blocks, own: Any = None, reference: Any = None) -> Codes:
        """A weight -> the codes whose values `fake` computes."""
        blocked = w.astype(jnp.float32).reshape(blocks.blocked)
        step = self.step(blocked, blocks, own, reference)
        return encode(self.grid, w.astype(jnp.float32), step, self.zero(blocked, step, blocks), blocks)


def _scaled_gradient(x: Any, factor: float) -> Any:
    """x, its gradient multiplied by `factor`."""

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    same.defjvp(lambda primals, tangents: (primals[0], tangents[0] * factor))
    return same(x)
