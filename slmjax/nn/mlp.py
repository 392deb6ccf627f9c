"""Feed-forward layers, applied to each token alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import positive
from slmjax.nn.layer import Layer
from slmjax.nn.parts import FeedForward


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return jax.nn.silu(x)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (`gelu_new` of transformers). Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    return jax.nn.gelu(x, approximate=True)


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(x)


def tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent."""
    return jnp.tanh(x)


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """down(activation(up(x)))."""

    hidden: int
    activation: Callable = gelu_tanh
    bias: bool = False

    def __post_init__(self):
        positive(hidden=self.hidden)

    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        return _down(layer, self.activation(_up(layer, "up", x, self.hidden, self.bias)), x.shape[-1], self.bias)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """down(activation(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202."""

    hidden: int
    activation: Callable = silu
    bias: bool = False

    def __post_init__(self):
        positive(hidden=self.hidden)

    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        gate = self.activation(_up(layer, "gate", x, self.hidden, self.bias))
        return _down(layer, gate * _up(layer, "up", x, self.hidden, self.bias), x.shape[-1], self.bias)


def SwiGLU(*, hidden: int, bias: bool = False) -> GatedMLP:
    """The gated MLP with SiLU."""
    return GatedMLP(hidden=hidden, activation=silu, bias=bias)


def _up(layer: Layer, name: str, x: jax.Array, hidden: int, with_bias: bool) -> jax.Array:
    weight = layer.matrix(name, (x.shape[-1], hidden), ("embed", "mlp"))
    bias = layer.bias(f"{name}_bias", (hidden,), ("mlp",)) if with_bias else None
    return layer.linear("btd,df->btf", x, weight, bias)


def _down(layer: Layer, x: jax.Array, width: int, with_bias: bool) -> jax.Array:
    weight = layer.matrix("down", (x.shape[-1], width), ("mlp", "embed"), residual=True)
    bias = layer.bias("down_bias", (width,), ("embed",)) if with_bias else None
    return layer.linear("btf,fd->btd", x, weight, bias)
