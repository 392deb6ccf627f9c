"""What a block is made of. A part is a frozen dataclass whose `__call__(layer, x, ...)` is its computation.

A new kind of part is a subclass in a file of its own: `Block` takes it, and nothing else has to know it.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import jax

from slmjax.nn.attention_kernels import Mask
from slmjax.nn.layer import Layer


class Norm(abc.ABC):
    """Normalises each token."""

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]"""


class FeedForward(abc.ABC):
    """Transforms each token alone."""

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]"""


class Mixer(abc.ABC):
    """Moves information from earlier tokens to later ones of the same segment."""

    label: ClassVar[str]
    """Its name in parameter paths"""

    @property
    @abc.abstractmethod
    def attended_width(self) -> int:
        """Channels of q·k and of the weighted values, over all heads, for counting FLOPs; 0 if it does not attend"""

    @abc.abstractmethod
    def table(self, positions: jax.Array) -> Any:
        """What every layer of this kind needs of positions [B, T], computed once a forward pass."""

    @abc.abstractmethod
    def init_cache(self, batch: int, length: int, dtype: str) -> Any:
        """What one layer has to remember of `length` tokens to go on from there, still empty."""

    @abc.abstractmethod
    def __call__(
        self, layer: Layer, x: jax.Array, table: Any, mask: Mask, cache: Any, depth: jax.Array
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], and the cache after these T tokens.

        Args:
            cache: `init_cache` stacked over layers, of which this layer is number `depth`; None while training.
            mask: what sees what; its `start` is the slot of the first of these tokens.
        """
