"""Feed-forward layers, applied to each token by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import positive
from slmjax.nn.layer import Layer
from slmjax.nn.parts import FeedForward, Flow


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

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        hidden = self.activation(_up(layer, "up", x, self.hidden, self.bias))
        return _down(layer, hidden, x.shape[-1], self.bias), flow


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """down(activation(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202."""

    hidden: int
    activation: Callable = silu
    bias: bool = False

    def __post_init__(self):
        positive(hidden=self.hidden)

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        gate = self.activation(_up(layer, "gate", x, self.hidden, self.bias))
        hidden = gate * _up(layer, "up", x, self.hidden, self.bias)
        return _down(layer, hidden, x.shape[-1], self.bias), flow


def SwiGLU(*, hidden: int, bias: bool = False) -> GatedMLP:
    """The gated MLP with SiLU."""
    return GatedMLP(hidden=hidden, activation=silu, bias=bias)


def _up(layer: Layer, name: str, x: jax.Array, hidden: int, bias: bool) -> jax.Array:
    return layer.linear(name, "btd,df->btf", x, (x.shape[-1], hidden), ("embed", "mlp"), bias=bias)


def _down(layer: Layer, x: jax.Array, width: int, bias: bool) -> jax.Array:
    shape = (x.shape[-1], width)
    return layer.linear("down", "btf,fd->btd", x, shape, ("mlp", "embed"), bias=bias, residual=True)
