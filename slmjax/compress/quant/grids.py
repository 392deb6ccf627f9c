"""Rounding of weights to a grid: `value = step * (code - zero + offset)` with an integer code.

One path computes the codes of the training forward pass and those of the export: `Grid.encode`, `Grid.decode`.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.quant.blocks import Blocks

ScaleType = Literal["float16", "bfloat16", "float32"]
EXPONENT_MANTISSA = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23)}
SMALLEST = 2.0**-14
"""The smallest step: the smallest normal float16. It also keeps a block of zeros from having no step at all"""


@dataclass(frozen=True, kw_only=True)
class Grid(abc.ABC):
    """Equally spaced values. `v` stands for `weight / step`."""

    low: int
    """Smallest code"""
    high: int
    """Largest code"""
    offset: float = 0.0
    """0.5 for a grid without a zero, whose values lie halfway between integers"""

    @abc.abstractmethod
    def encode(self, v: Any) -> Any:
        """v -> integer codes in [low, high], as floats."""

    @abc.abstractmethod
    def passes(self, v: Any) -> Any:
        """Whether the gradient of a value passes to its weight (straight-through estimator)."""

    def follows(self, v: Any) -> Any:
        """Whether the gradient of the step is `value / step - v` (the value moves, the weight stays) instead of
        `value / step`, as for a clipped weight."""
        return self.passes(v)

    @property
    def levels(self) -> int:
        """The number of values"""
        return self.high - self.low + 1

    @property
    def codes(self) -> tuple[int, ...]:
        """All codes, in ascending order"""
        return tuple(range(self.low, self.high + 1))

    def numbered(self, number: Any) -> Any:
        """Integers, indices of `codes` -> the codes, float32."""
        return number.astype(jnp.float32) + self.low


@dataclass(frozen=True, kw_only=True)
class Nearest(Grid):
    """The nearest value: `clip(round(v))`. Gradients pass wherever the rounded value is not clipped."""

    def encode(self, v: Any) -> Any:
        return jnp.clip(jnp.round(v - self.offset), self.low, self.high)

    def passes(self, v: Any) -> Any:
        rounded = jnp.round(v - self.offset)
        return (rounded >= self.low) & (rounded <= self.high)


@dataclass(frozen=True, kw_only=True)
class Clipped(Grid):
    """`round(clip(v))`. Gradients pass between the smallest and the largest value. LSQ, arXiv:1902.08153."""

    def encode(self, v: Any) -> Any:
        return jnp.round(jnp.clip(v - self.offset, self.low, self.high))

    def passes(self, v: Any) -> Any:
        return (v >= self.low + self.offset) & (v <= self.high + self.offset)


@dataclass(frozen=True, kw_only=True)
class Floor(Grid):
    """`clip(floor(v)) + 1/2`. Gradients pass wherever the floor is not clipped. arXiv:2507.13575."""

    offset: float = 0.5

    def encode(self, v: Any) -> Any:
        return jnp.clip(jnp.floor(v), self.low, self.high)

    def passes(self, v: Any) -> Any:
        return (v >= self.low) & (v < self.high + 1)


@dataclass(frozen=True, kw_only=True)
class Stretched(Grid):
    """SEQ: `round(clip(v, -.99 n, .99 n) - offset)` with n = levels / 2. ParetoQ, arXiv:2502.02631."""

    edge: float = 0.99

    @property
    def half(self) -> float:
        return self.levels / 2

    def encode(self, v: Any) -> Any:
        return jnp.round(jnp.clip(v, -self.edge * self.half, self.edge * self.half) - self.offset)

    def passes(self, v: Any) -> Any:
        return jnp.abs(v) <= self.edge * self.half


@dataclass(frozen=True, kw_only=True)
class Sign(Grid):
    """Two values, plus and minus half a step, by the sign of v; the sign of 0 is plus. Gradients pass between them."""

    low: int = -1
    high: int = 0
    offset: float = 0.5

    def encode(self, v: Any) -> Any:
        return jnp.where(v >= 0, 0.0, -1.0)

    def passes(self, v: Any) -> Any:
        return jnp.abs(v) <= 0.5

    def follows(self, v: Any) -> Any:
        return jnp.zeros(v.shape, bool)


@dataclass(frozen=True, kw_only=True)
class Everywhere(Nearest):
    """The nearest value, the gradient passing everywhere. BitNet b1.58, arXiv:2402.17764."""

    def passes(self, v: Any) -> Any:
        return jnp.ones(v.shape, bool)


class Codes(NamedTuple):
    """A weight on a grid."""

    codes: Any  # int16, of the weight's shape
    steps: Any  # float32, Blocks.scales
    zeros: Any  # int16, Blocks.scales; None for a symmetric grid


def decode(codes: Any, step: Any, zero: Any, offset: float) -> Any:
    """Codes, steps and zero points (broadcast against each other) -> values, float32. One rounding, so the same values
    wherever it is computed."""
    shifted = codes.astype(jnp.float32) + offset if zero is None else codes.astype(jnp.float32) - zero + offset
    return step * shifted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def rounded(grid: Grid, w: Any, step: Any, zero: Any, over: tuple[int, ...]) -> Any:
    """Blocked weights -> the grid's values, with the straight-through gradient of the weights and the grid's gradient
    of the steps. `step` and `zero` (None: symmetric) broadcast against w; `over` are the dimensions that share them."""
    return decode(_encode(grid, w, step, zero), step, zero, grid.offset)


def units(w: Any, step: Any) -> Any:
    """Weights in units of the step, `w * (1 / step)`. Not `w / step`: XLA turns that into this product in some programs
    and not in others, and near a tie two programs would choose different codes."""
    return w * (1 / step)


def _encode(grid: Grid, w: Any, step: Any, zero: Any) -> Any:
    v = units(w, step)
    return grid.encode(v) if zero is None else jnp.clip(jnp.round(v) + zero, grid.low, grid.high)


def _forward(grid: Grid, w: Any, step: Any, zero: Any, over: tuple[int, ...]) -> Any:
    return rounded(grid, w, step, zero, over), (w, step, zero)


def _backward(grid: Grid, over: tuple[int, ...], kept: Any, g: Any) -> Any:
    w, step, zero = kept
    v = units(w, step)
    codes = _encode(grid, w, step, zero)
    if zero is None:
        value, passes, follows = codes + grid.offset, grid.passes(v), grid.follows(v)
    else:
        unclipped = jnp.round(v) + zero
        value, passes = codes - zero + grid.offset, (unclipped >= grid.low) & (unclipped <= grid.high)
        follows = passes
    of_step = g * jnp.where(follows, value - v, value)
    none = None if zero is None else jnp.zeros_like(zero)
    return g * passes, jnp.sum(of_step, axis=over, keepdims=True), none


rounded.defvjp(_forward, _backward)


def encode(grid: Grid, w: Any, step: Any, zero: Any, blocks: Blocks) -> Codes:
    """The weight (of shape `blocks.shape`) as codes; `decode` of them is `rounded` of the weight, bit for bit.

    Args:
        step, zero: of shape `blocks.broadcast`.
    """
    codes = _encode(grid, w.reshape(blocks.blocked), step, zero).astype(jnp.int16).reshape(blocks.shape)
    return Codes(
        codes, step.reshape(blocks.scales), None if zero is None else zero.reshape(blocks.scales).astype(jnp.int16)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def stored(step: Any, kind: ScaleType) -> Any:
    """Steps rounded to the type that a file stores them in, at least `SMALLEST`; gradients pass unchanged.

    By `reduce_precision`: XLA may leave out a conversion to a smaller type and back (xla_allow_excess_precision).
    """
    at_least = jnp.maximum(step, SMALLEST)
    return at_least if kind == "float32" else jax.lax.reduce_precision(at_least, *EXPONENT_MANTISSA[kind])


@stored.defjvp
def _stored_jvp(kind: ScaleType, primals: Any, tangents: Any) -> Any:
    return stored(primals[0], kind), tangents[0]


def decoded(packed: Codes, grid: Grid, blocks: Blocks) -> np.ndarray:
    """Codes -> the weight, float32, as numpy."""
    codes = np.asarray(packed.codes, np.float32).reshape(blocks.blocked)
    step = np.asarray(packed.steps, np.float32).reshape(blocks.broadcast)
    zero = 0.0 if packed.zeros is None else np.asarray(packed.zeros, np.float32).reshape(blocks.broadcast)
    values = step * (codes - zero + np.float32(grid.offset)) + np.float32(0)  # +0, also where a step is negative
    return values.reshape(blocks.shape)
