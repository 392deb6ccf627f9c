"""Rounding that is part of a model's function: of products with parameters, and of the key-value cache.

`Compute` decides how a function is computed, `Numerics` which function it is. `Numerics` belongs to the experiment: it
is part of the fingerprint and stored with checkpoints, and evaluation and generation use the same.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.nn.encoded import Weight


@dataclass(frozen=True, kw_only=True)
class Product:
    """The product of activations and a parameter, here without rounding. A subclass may round either of them first,
    depending on the parameter's path.

    Example: activations in 8 bits inside the layers alone:

        def __call__(self, path, equation, x, weight, einsum):
            return einsum(equation, rounded(x) if tree.matches(path, ("layers*/*",)) else x, weight)
    """

    def __call__(self, path: str, equation: str, x: jax.Array, weight: Weight, einsum: Callable) -> jax.Array:
        """`einsum(equation, x, weight)`; all three arrays have the compute dtype. `weight` may be encoded
        (`nn.encoded`): `einsum` takes it, and `encoded.values(weight)` is its array.

        Args:
            path: the parameter's path in the tree of parameters, in which layers are stacked: `layers/attn/q`,
                `layers/0/mlp/up`, `head/transform`; for the logits, the path of the output table (`embed/table` if it
                is tied, else `unembed/table`).
            einsum: the kernel, `Compute.einsum`.
        """
        return einsum(equation, x, weight)


class Cache(abc.ABC):
    """How generation stores keys (or values) of G heads with K channels.

    A layer stores any tree of arrays whose third dimension is that of the S slots. `stack` is that tree with the layers
    of a stage stacked in a leading dimension.
    """

    @abc.abstractmethod
    def init(self, batch: int, heads: int, length: int, width: int, dtype: str) -> Any:
        """An empty cache of one layer for `length` tokens: arrays [B, G, S, ...]."""

    @abc.abstractmethod
    def write(self, stack: Any, new: jax.Array, depth: jax.Array, start: jax.Array) -> Any:
        """`stack` with `new` [B, T, G, K] in layer `depth` from slot `start` on."""

    @abc.abstractmethod
    def read(self, stack: Any, depth: jax.Array, dtype: Any) -> jax.Array:
        """[B, S, G, K] of layer `depth`."""


@dataclass(frozen=True, kw_only=True)
class PlainCache(Cache):
    """Stored in the compute dtype as [B, G, S, K], the order in which attention reads it: with another one, all of it
    would be reordered for each token."""

    def init(self, batch: int, heads: int, length: int, width: int, dtype: str) -> jax.Array:
        return jnp.zeros((batch, heads, length, width), dtype)

    def write(self, stack: jax.Array, new: jax.Array, depth: jax.Array, start: jax.Array) -> jax.Array:
        return put(stack, new.swapaxes(1, 2), depth, start)

    def read(self, stack: jax.Array, depth: jax.Array, dtype: Any) -> jax.Array:
        return take(stack, depth).swapaxes(1, 2).astype(dtype)


def put(stack: jax.Array, new: jax.Array, depth: jax.Array, start: jax.Array) -> jax.Array:
    """stack [L, B, G, S, X] with new [B, G, T, X] at layer `depth` from slot `start` on."""
    return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], (depth, 0, 0, start, 0))


def take(stack: jax.Array, depth: jax.Array) -> jax.Array:
    """stack [L, B, G, S, X] -> [B, G, S, X] of layer `depth`."""
    return jax.lax.dynamic_index_in_dim(stack, depth, keepdims=False)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How products and the key-value cache are rounded. By default only to `Compute.dtype`."""

    product: Product = field(default_factory=Product)
    """How products of activations and parameters are rounded"""
    cache: Cache = field(default_factory=PlainCache)
    """How generation stores keys and values"""
