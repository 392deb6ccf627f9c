"""The one Linen module: it gives a value (`RMSNorm(...)`, `Attention(...)`) its parameters, names and precision.

A part of a model is a frozen dataclass whose `__call__(layer, x, ...)` is its whole computation. `layer` declares the
part's parameters and makes its children, so shapes, initial values and logical axes are each stated once, where used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from slmjax.errors import UserError
from slmjax.nn.compute import Compute


@dataclass(frozen=True, kw_only=True)
class Initial:
    """Initial values: normal matrices, with the two matrices of a block that write to the residual stream made smaller.

    The residual stream sums 2L branch outputs, so their standard deviation is divided by sqrt(2L).
    Radford et al. 2019 (GPT-2), section 2.3. Gains start at 1, biases at 0.
    """

    std: float = 0.02
    """Standard deviation of every matrix and table"""
    residual: float = 1.0
    """Factor on `std` for matrices that write to the residual stream (`Decoder` sets 1/sqrt(2L))"""

    def __post_init__(self):
        for name in ("std", "residual"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"initial.{name}: {getattr(self, name)} is not a number of at least 0")


class Declared(nn.LogicallyPartitioned):
    """A parameter at its birth: the array, its logical axes (`names`), and its initial distribution in words."""

    initial: str = struct.field(pytree_node=False, default="")


class Layer(nn.Module):
    """Calls `spec` with itself."""

    spec: Any
    compute: Compute
    initial: Initial

    @nn.compact
    def __call__(self, *args):
        return self.spec(self, *args)

    def child(self, name: str, spec: Any) -> Layer:
        """A part under `name`; call it with the part's arguments."""
        return Layer(spec=spec, compute=self.compute, initial=self.initial, name=name)

    def matrix(self, name: str, shape: tuple[int, ...], axes: tuple, residual: bool = False) -> jax.Array:
        """A normally distributed parameter, float32. `residual`: it writes to the residual stream."""
        std = self.initial.std * (self.initial.residual if residual else 1.0)
        return self._declare(name, nn.initializers.normal(std), shape, axes, f"normal({std:.4g})")

    def gain(self, name: str, shape: tuple[int, ...], axes: tuple) -> jax.Array:
        """A parameter of ones, float32."""
        return self._declare(name, nn.initializers.ones, shape, axes, "ones")

    def bias(self, name: str, shape: tuple[int, ...], axes: tuple) -> jax.Array:
        """A parameter of zeros, float32."""
        return self._declare(name, nn.initializers.zeros, shape, axes, "zeros")

    def _declare(self, name: str, initializer: Any, shape: tuple[int, ...], axes: tuple, initial: str) -> Any:
        def boxed(key, shape, dtype):
            return Declared(initializer(key, shape, dtype), names=axes, initial=initial)

        return self.param(name, boxed, shape, jnp.float32)

    def linear(self, equation: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`einsum(equation, x, weight) + bias`, in the compute dtype."""
        y = self.compute.einsum(equation, self.cast(x), self.cast(weight))
        # The bias is added in float32 so that its gradient, a sum over all tokens, is in float32 too.
        return y if bias is None else self.cast(y.astype(jnp.float32) + bias)

    def cast(self, x: jax.Array) -> jax.Array:
        """To the compute dtype."""
        return x.astype(self.compute.dtype)
