"""Normalisation over the last axis or axes, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.layer import Layer
from slmjax.nn.parts import Norm


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """x / rms(x) * (offset + scale). Zhang & Sennrich 2019, arXiv:1910.07467."""

    eps: float = 1e-5
    offset: float = 0.0
    """1 for Gemma, whose `scale` is the difference from 1 and starts at 0"""
    round_first: bool = True
    """Whether x / rms(x) is rounded to the compute dtype before the gain, as Llama does, or after it, as Gemma does"""

    def __post_init__(self):
        _check(self.eps)

    def __call__(self, layer: Layer, x: jax.Array, axes: tuple[str, ...] = ("embed",), over: int = 1) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(_mean(jnp.square(wide), over) + self.eps)
        # The gain is applied in float32 so that its gradient, a sum over all tokens, is too.
        wide = layer.cast(wide).astype(jnp.float32) if self.round_first else wide
        declare = layer.bias if self.offset else layer.gain
        scale = declare("scale", x.shape[-len(axes) :], axes)
        return layer.cast(wide * (self.offset + scale if self.offset else scale))


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """(x - mean) / std * scale + bias. Ba et al. 2016, arXiv:1607.06450."""

    eps: float = 1e-5
    bias: bool = True
    gain: bool = True
    """Whether there is a `scale`"""

    def __post_init__(self):
        _check(self.eps)

    def __call__(self, layer: Layer, x: jax.Array, axes: tuple[str, ...] = ("embed",), over: int = 1) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - _mean(wide, over)
        wide = wide * jax.lax.rsqrt(_mean(jnp.square(wide), over) + self.eps)
        shape = x.shape[-len(axes) :]
        wide = wide * layer.gain("scale", shape, axes) if self.gain else wide
        return layer.cast(wide + layer.bias("bias", shape, axes) if self.bias else wide)


def _check(eps: float) -> None:
    if not 0 <= eps < 1:
        raise UserError(f"eps: {eps} of a norm is not between 0 and 1; typical is 1e-5")


def _mean(x: jax.Array, over: int) -> jax.Array:
    """Over the last `over` axes, which stay as axes of size 1."""
    return jnp.mean(x, axis=tuple(range(-over, 0)), keepdims=True)
