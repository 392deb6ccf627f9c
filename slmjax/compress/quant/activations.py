"""Activations in few bits: the inputs of products with parameters, rounded with a scale for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.errors import UserError
from slmjax.nn.encoded import Weight
from slmjax.nn.numerics import Product


def summed(equation: str, dimensions: int) -> tuple[int, ...]:
    """The dimensions of x in `einsum(equation, x, weight)` that the product sums over. `dimensions`: how many x has."""
    inputs, _, out = equation.partition("->")
    of_x = inputs.split(",")[0].removeprefix("...")
    return tuple(dimensions - len(of_x) + i for i, letter in enumerate(of_x) if letter not in out)


@jax.custom_jvp
def straight_through(x: Any, value: Any) -> Any:
    """`value`, with the gradient of x."""
    return value


straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def nearest(x: Any, scale: Any, most: int) -> Any:
    """x rounded to a multiple of `scale` of at most `most` steps, in float32."""
    return jnp.clip(jnp.round(x / scale), -most - 1, most) * scale


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A scale for each token, from its largest value."""

    def __call__(self, path: str, x: Any, over: tuple[int, ...], most: int) -> Any:
        """The scale of x, of a shape that broadcasts against it."""
        return jnp.maximum(jnp.max(jnp.abs(x), axis=over, keepdims=True), 1e-5) / most


@dataclass(frozen=True, kw_only=True)
class Static:
    """A fixed scale for each parameter, measured on data before."""

    largest: tuple[tuple[str, float], ...] = ()
    """(path of the parameter, the largest |x| that was seen, in all layers of a stack together)"""

    def __call__(self, path: str, x: Any, over: tuple[int, ...], most: int) -> Any:
        known = dict(self.largest)
        if path not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"numerics.product.scale.largest has no value for {path}; there are: {there}")
        return jnp.float32(max(known[path], 1e-5) / most)


@dataclass(frozen=True, kw_only=True)
class RoundedInputs(Product):
    """Products whose activations are rounded to `bits` first, symmetrically; the gradient passes unchanged.

    References:
        BitNet b1.58, arXiv:2402.17764, for 8 bits with a scale for each token
    """

    bits: int = 8
    scale: Dynamic | Static = field(default_factory=Dynamic)
    patterns: tuple[str, ...] = ("layers*",)
    """Globs of the paths of the parameters whose inputs are rounded"""

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise UserError(f"numerics.product.bits is {self.bits}; expected 2 to 8")

    def __call__(self, path: str, equation: str, x: jax.Array, weight: Weight, einsum: Callable) -> jax.Array:
        if not tree.matches(path, self.patterns):
            return einsum(equation, x, weight)
        wide, most = jax.lax.stop_gradient(x.astype(jnp.float32)), 2 ** (self.bits - 1) - 1
        value = nearest(wide, self.scale(path, wide, summed(equation, x.ndim), most), most)
        return einsum(equation, straight_through(x, value.astype(x.dtype)), weight)
