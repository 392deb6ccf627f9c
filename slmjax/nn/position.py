"""Where a token stands: added to the embedding (`Learned`), or rotated into queries and keys (`Rope`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.nn.layer import Layer


@dataclass(frozen=True, kw_only=True)
class NoPosition:
    """Order is known only through the causal mask (or through positions added to the embedding)."""

    def table(self, positions: jax.Array, head_dim: int) -> None:
        return None

    def rotate(self, x: jax.Array, table: None) -> jax.Array:
        return x


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Stretches the slow rotations so that a model trained at `original_context` reaches further. Llama 3.1, 2024.

    A wavelength (in tokens) above original_context/low is divided in frequency by `factor`, one below
    original_context/high is kept, and those between are blended.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:  # float32 [K/2] -> float32 [K/2]
        wavelength = np.float32(2 * math.pi) / frequencies
        blend = (np.float32(self.original_context) / wavelength - np.float32(self.low)) / np.float32(
            self.high - self.low
        )
        blend = np.clip(blend, 0, 1)
        return ((1 - blend) * frequencies / np.float32(self.factor) + blend * frequencies).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: channel i is paired with i + K/2 (rotate-half). Su et al. 2021, arXiv:2104.09864.

    In float32 over the full width: bfloat16 cannot count positions beyond 256.
    """

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a token, float32 [K/2]."""
        # Rounded where transformers rounds: at position 8000 one unit in the last place is already 5e-4 radians.
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = np.float32(1) / np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        return frequencies if self.scaling is None else self.scaling(frequencies)

    def table(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """positions [B, T] -> cosines and sines, float32 [B, T, 1, K]. One table serves all layers."""
        angles = positions[..., None, None].astype(jnp.float32) * self.frequencies(head_dim)
        angles = jnp.concatenate([angles, angles], axis=-1)
        # Held apart, or XLA would compute them again in every layer, for queries and keys, forward and backward.
        return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))

    def rotate(self, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:  # [B, T, H, K]
        cos, sin = table
        wide = x.astype(jnp.float32)
        first, second = jnp.split(wide, 2, axis=-1)
        return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A vector for each position, added to the token's embedding."""

    def __call__(self, layer: Layer, positions: jax.Array, width: int, context: int) -> jax.Array:  # [B,T] -> [B,T,D]
        return jnp.take(layer.matrix("positions", (context, width), ("context", "embed")), positions, axis=0)
