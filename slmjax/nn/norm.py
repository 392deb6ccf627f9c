"""Normalisation over the last axis, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.nn.layer import Layer
from slmjax.nn.parts import Norm


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """x / rms(x) * scale. Zhang & Sennrich 2019, arXiv:1910.07467. Cast before the gain, as Llama does."""

    eps: float = 1e-5

    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        # The gain is applied in float32 so that its gradient, a sum over all tokens, is too.
        rounded = layer.cast(wide).astype(jnp.float32)
        return layer.cast(rounded * layer.gain("scale", x.shape[-1:], ("embed",)))


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """(x - mean) / std * scale + bias. Ba et al. 2016, arXiv:1607.06450."""

    eps: float = 1e-5
    bias: bool = True

    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide * layer.gain("scale", x.shape[-1:], ("embed",))
        return layer.cast(wide + layer.bias("bias", x.shape[-1:], ("embed",)) if self.bias else wide)
