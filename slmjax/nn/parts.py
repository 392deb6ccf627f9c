"""The parts of a block: norm, mixer, feed-forward layer. A part is a frozen dataclass; its `__call__(layer, x, ...)` is
its computation.

A new kind of part is a subclass in a file of its own, given to a block; no other code has to change.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_kernels import Mask, Scores
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Cache


class Norm(abc.ABC):
    """Normalises each token."""

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array, axes: tuple[str, ...] = ("embed",), over: int = 1) -> jax.Array:
        """[..., D] -> [..., D]

        Args:
            axes: logical axes of the gain; its shape is that of as many last axes of x.
            over: number of last axes over which the statistics are taken together.
        """


class Flow(NamedTuple):
    """What a part gets besides x, and returns with its changes."""

    table: Any
    """`Mixer.table` of these positions"""
    mask: Mask
    """Which keys each query sees; its `start` is the cache slot of the first of these tokens"""
    cache: Any
    """`Mixer.init_cache` stacked over the layers of a stage; None while training"""
    depth: jax.Array
    """Index of this layer in the stack, int32 []"""
    shared: dict[str, Any]
    """Arrays of earlier layers that later layers use, by name: keys and values [B, S, G, K]"""
    auxiliary: dict[str, jax.Array]
    """Terms of the loss that parts have added so far, by name, with a value for each token, float32 [B, T]"""

    @property
    def real(self) -> jax.Array:
        """Which tokens are not padding, bool [B, T]."""
        return self.mask.query_segments > 0

    def adding(self, name: str, value: jax.Array) -> Flow:
        """A `Flow` with `value`, float32 [B, T], added to the auxiliary output of this name (`FeedForward.auxiliary`).

        Raises:
            UserError: no part has declared it.
        """
        if name not in self.auxiliary:
            declared = ", ".join(self.auxiliary) or "none"
            raise UserError(f"auxiliary: a part adds {name!r}, which no part declares (declared: {declared})")
        total = self.auxiliary[name] + value.astype(jnp.float32)
        return self._replace(auxiliary={**self.auxiliary, name: total})


class FeedForward(abc.ABC):
    """Transforms each token by itself."""

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the terms of the loss that this part adds to `Flow.auxiliary`, such as a load-balancing loss.

        A term has a value for each token, with its factor applied. The objective adds their mean over the tokens of the
        batch, weighted like the loss itself, and reports it as a metric of this name; equal names of several layers are
        summed. A token's value may depend only on tokens of its own segment, so that micro-batches, padding and packing
        do not change it.
        """
        return ()

    def active(self, name: str) -> float:
        """The share of the parameter `name` (its path inside this part) that a token uses, for counting FLOPs."""
        return 1.0

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D], and `flow` with its auxiliary outputs."""


class Mixer(abc.ABC):
    """Moves information between the tokens of a segment."""

    label: ClassVar[str]
    """Its name in parameter paths"""

    @property
    @abc.abstractmethod
    def attended_width(self) -> int:
        """Channels of q·k and of the weighted values, over all heads, for counting FLOPs; 0 if it is no attention"""

    def attended_keys(self, length: int) -> float:
        """How many keys a query of a sequence of `length` tokens sees on average."""
        return length / 2

    @property
    def rule(self) -> Scores | None:
        """How attention scores follow from queries and keys; None if it is no attention."""
        return None

    @property
    def table_key(self) -> Hashable:
        """Mixers with equal keys share one table."""
        return self

    @abc.abstractmethod
    def table(self, positions: jax.Array) -> Any:
        """Arrays that depend on positions [B, T] alone, computed once in each forward pass for all layers of this
        kind."""

    @abc.abstractmethod
    def init_cache(self, batch: int, length: int, dtype: str, codec: Cache) -> Any:
        """An empty cache of one layer for `length` tokens, from which generation can go on.

        Args:
            dtype: the compute dtype.
            codec: how keys and values are stored (`Numerics.cache`).
        """

    def init_shared(self, batch: int, length: int, dtype: str) -> dict[str, Any]:
        """Zeros in the shapes of the arrays that this layer puts into `Flow.shared`."""
        return {}

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D], and `flow` with the cache (and what is shared) after these T tokens."""
