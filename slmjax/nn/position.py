"""Positions of tokens: vectors added to the embedding (`Learned`), rotations of queries and keys (`Rope`), or a penalty
on distance (`Alibi`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.errors import UserError, positive
from slmjax.nn.layer import Layer
from slmjax.nn.rope_scaling import RopeScaling


class Position:
    """How attention uses positions. This base class does not use them."""

    def table(self, positions: jax.Array, head_dim: int) -> Any:
        """positions [B, T] -> the argument `table` of `rotate`, computed once for all layers."""
        return None

    def rotate(self, x: jax.Array, table: Any) -> jax.Array:
        """Queries or keys [B, T, H, K] -> the same shape."""
        return x

    def slopes(self, heads: int) -> tuple[float, ...] | None:
        """For each head, what is subtracted from a score for each token of distance; None for nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoPosition(Position):
    """Attention does not use positions: only the causal mask, or positions added to the embedding, tell the order."""


@dataclass(frozen=True, kw_only=True)
class Alibi(Position):
    """A score loses `slope` for each token of distance. Press et al. 2021, arXiv:2108.12409.

    Slopes are 2^(-8i/n), i = 1 ... n, for n heads if n is a power of 2; else those of the next smaller power, and then
    every second one of the next larger.
    """

    def slopes(self, heads: int) -> tuple[float, ...]:
        power = 2 ** math.floor(math.log2(heads))
        # In float32, as transformers computes them: base ** (1 ... n).
        base, extra = (np.float32(2 ** (-(2 ** -(math.log2(n) - 3)))) for n in (power, 2 * power))
        slopes = [base**i for i in range(1, power + 1)]
        return tuple(float(x) for x in slopes + [extra**i for i in range(1, 2 * (heads - power), 2)])


@dataclass(frozen=True, kw_only=True)
class Rope(Position):
    """Rotary positions: channel i is paired with i + K/2 (rotate-half). Su et al. 2021, arXiv:2104.09864.

    Computed in float32: bfloat16 cannot represent every position beyond 256.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    fraction: float = 1.0
    """Share of each head's channels, from the first on, that are rotated; the others stay as they are"""

    def __post_init__(self):
        positive(theta=self.theta)
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"fraction: {self.fraction} of a head's channels cannot be rotated; expected 0 to 1, above 0"
            )

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int, positions: Any = 0) -> Any:
        """Radians a token, float32 [K/2]."""
        # Rounded where transformers rounds: at position 8000 one unit in the last place is already 5e-4 radians.
        width = self.rotated(head_dim)
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        powers = np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        return (
            np.float32(1) / powers if self.scaling is None else self.scaling.frequencies(powers, positions, self.theta)
        )

    def table(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """positions [B, T] -> cosines and sines, float32 [B, T, 1, K]. One table serves all layers."""
        angles = positions[..., None, None].astype(jnp.float32) * self.frequencies(head_dim, positions)
        angles = jnp.concatenate([angles, angles], axis=-1)
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        cos, sin = (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)
        # An optimization barrier: else XLA computes them again in every layer, for queries and for keys, forward and
        # backward.
        return jax.lax.optimization_barrier((cos, sin))

    def rotate(self, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:  # [B, T, H, K]
        cos, sin = table
        width = cos.shape[-1]
        wide = x[..., :width].astype(jnp.float32)
        first, second = jnp.split(wide, 2, axis=-1)
        turned = (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
        return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A vector for each position, added to the token's embedding."""

    offset: int = 0
    """Number of unused rows in the table before that of position 0 (2 in OPT)"""
    scale: float = 1.0
    """Factor on the vectors (muP)"""

    def __call__(self, layer: Layer, positions: jax.Array, width: int, context: int) -> jax.Array:  # [B,T] -> [B,T,D]
        table = layer.matrix("positions", (context + self.offset, width), ("context", "embed"))
        x = jnp.take(table, positions + self.offset if self.offset else positions, axis=0)
        return x if self.scale == 1.0 else x * self.scale
