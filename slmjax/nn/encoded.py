"""Parameters that are kept in a shorter form than an array of floats, and become floats where a layer uses them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp


class Encoded(abc.ABC):
    """A parameter whose floats exist only while a layer computes with them.

    It stands in the tree of parameters where the array would, as a pytree whose arrays have the stacking dimension of
    the layers first: the scan over layers cuts them like any other. Only for computing without gradients.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abc.abstractmethod
    def astype(self, dtype: Any) -> Encoded:
        """The same parameter, whose floats will have this dtype."""

    @abc.abstractmethod
    def values(self) -> jax.Array:
        """The whole array."""

    @abc.abstractmethod
    def rows(self, ids: jax.Array) -> jax.Array:
        """`values()[ids]`, for integers of any shape, without the other rows."""

    @abc.abstractmethod
    def contracted(self, equation: str, x: jax.Array, einsum: Callable) -> jax.Array:
        """`einsum(equation, x, values())`; it may be computed in pieces, so that few of the floats exist at once."""


Weight: TypeAlias = jax.Array | Encoded
"""A parameter as a layer gets it"""


def is_encoded(x: Any) -> bool:
    """Whether x is a parameter in a shorter form."""
    return isinstance(x, Encoded)


def values(weight: Weight) -> jax.Array:
    """The parameter as an array."""
    return weight.values() if isinstance(weight, Encoded) else weight


def rows(table: Weight, ids: jax.Array) -> jax.Array:
    """table [V, D], ids [...] -> [..., D]."""
    return table.rows(ids) if isinstance(table, Encoded) else jnp.take(table, ids, axis=0)


def contraction(einsum: Callable) -> Callable:
    """`einsum` (equation, x, weight), for weights that are arrays or encoded."""

    def contracted(equation: str, x: jax.Array, weight: Weight) -> jax.Array:
        return weight.contracted(equation, x, einsum) if isinstance(weight, Encoded) else einsum(equation, x, weight)

    return contracted
