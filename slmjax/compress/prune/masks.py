"""Masks that keep the entries with the highest scores. Exactly as many are pruned as asked for; of equal scores the
first is pruned first. All of it works inside jit, with a sparsity that changes from step to step."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from slmjax.compress.prune.layout import from_matrices, to_matrices
from slmjax.compress.quant.blocks import Axes
from slmjax.errors import UserError

Count: TypeAlias = Callable[[int], Any]
"""How many entries there are -> how many of them are pruned: an integer, or an int32 array []"""


def check_sparsity(name: str, sparsity: float) -> None:
    """
    Raises:
        UserError: it is not a share of weights that can be pruned.
    """
    if not 0 <= sparsity < 1:
        raise UserError(
            f"{name} is {sparsity}; expected a share of weights to prune, at least 0 and below 1, such as 0.5"
        )


def share(sparsity: float) -> Count:
    """The nearest whole number to `sparsity` times the entries."""
    return lambda entries: round(sparsity * entries)


def lowest(scores: Any, count: Any) -> Any:
    """[R, n] -> bool [R, n]: the `count` lowest scores of each row, exactly; of equal ones the first.

    Args:
        count: an integer or int32 array [], 0 to n.
    """
    at = jnp.clip(jnp.asarray(count, jnp.int32) - 1, 0)
    limit = jax.lax.dynamic_index_in_dim(jnp.sort(scores, axis=1), at, axis=1)  # [R, 1]
    below, equal = scores < limit, scores == limit
    places = count - jnp.sum(below, axis=1, keepdims=True)  # left for those that equal the limit
    return below | (equal & (jnp.cumsum(equal, axis=1) <= places))


@dataclass(frozen=True, kw_only=True)
class Scope(abc.ABC):
    """Which entries compete with one another: of each such set the same share is pruned."""

    @abc.abstractmethod
    def sets(self, matrices: Any, path: str) -> Any:
        """[S, out, in] -> [sets, entries], a reshape.

        Raises:
            UserError: the matrices cannot be divided in this way.
        """

    def check(self, sparsity: float) -> None:  # noqa: B027  most can have any
        """Raises UserError if the sets cannot have this sparsity."""

    def keep(self, scores: Mapping[str, Any], axes: Mapping[str, Axes], count: Count) -> dict[str, Any]:
        """Masks, True where a weight is kept.

        Args:
            scores: {path: float array of the parameter's shape}; the lowest are pruned.
            axes: {path: logical axes} of the parameters.
            count: how many of a set's entries are pruned.
        """
        masks = {}
        for path, of_weights in scores.items():
            matrices = to_matrices(of_weights, axes[path], path)
            sets = self.sets(matrices, path)
            pruned = lowest(sets, count(sets.shape[1])).reshape(matrices.shape)
            masks[path] = ~from_matrices(pruned, of_weights.shape, axes[path], path)
        return masks


@dataclass(frozen=True, kw_only=True)
class Global(Scope):
    """All chosen matrices are one set: layers with small weights lose more of them."""

    def sets(self, matrices: Any, path: str) -> Any:
        return matrices.reshape(1, -1)

    def keep(self, scores: Mapping[str, Any], axes: Mapping[str, Axes], count: Count) -> dict[str, Any]:
        entries = sum(x.size for x in scores.values())
        if entries >= 2**31:
            raise UserError(f"scope: Global() of {entries} weights; it can rank 2^31 - 1. Choose fewer, or PerLayer()")
        ranked = jnp.concatenate([x.reshape(1, -1) for x in scores.values()], axis=1)
        pruned, masks, first = lowest(ranked, count(entries))[0], {}, 0
        for path, x in scores.items():
            masks[path] = ~pruned[first : first + x.size].reshape(x.shape)
            first += x.size
        return masks


@dataclass(frozen=True, kw_only=True)
class PerLayer(Scope):
    """Each matrix of each layer is a set."""

    def sets(self, matrices: Any, path: str) -> Any:
        return matrices.reshape(matrices.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class PerRow(Scope):
    """The weights of each output channel are a set."""

    def sets(self, matrices: Any, path: str) -> Any:
        return matrices.reshape(-1, matrices.shape[2])


@dataclass(frozen=True, kw_only=True)
class NOfM(Scope):
    """N of every M consecutive input channels of an output channel are kept: 2:4 is a sparsity of 0.5 with `m=4`, 4:8
    the same with `m=8`. Mishra et al. 2021, arXiv:2104.08378."""

    m: int = 4

    def __post_init__(self):
        if self.m < 2:
            raise UserError(f"scope.m is {self.m}; expected 2 or more input channels, such as 4 for 2:4")

    def check(self, sparsity: float) -> None:
        if abs(sparsity * self.m - round(sparsity * self.m)) > 1e-6:
            raise UserError(
                f"the sparsity is {sparsity}, which is not a whole number of every {self.m} weights; "
                f"choose one, such as {round(sparsity * self.m)}/{self.m}"
            )

    def sets(self, matrices: Any, path: str) -> Any:
        if matrices.shape[2] % self.m:
            raise UserError(
                f"scope.m is {self.m}, which does not divide the {matrices.shape[2]} input channels of {path}; "
                "leave it out with patterns, or choose another m"
            )
        return matrices.reshape(-1, self.m)
