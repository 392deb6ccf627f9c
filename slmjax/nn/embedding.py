"""Tokens to vectors, and vectors to logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.nn.compute import Compute
from slmjax.nn.layer import Layer
from slmjax.nn.position import Learned


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A table of token vectors, plus learned positions if there are any."""

    vocab: int
    width: int
    context: int
    position: Learned | None = None

    def __call__(self, layer: Layer, tokens: jax.Array, positions: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        # Rows are taken before the cast, so that the gradients of a frequent token add up in float32.
        x = jnp.take(layer.matrix("table", (self.vocab, self.width), ("vocab", "embed")), tokens, axis=0)
        if self.position is not None:
            x = x + self.position(layer, positions, self.width, self.context)
        return layer.cast(x)


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """A table of output vectors of its own, when the input table is not used twice (Press & Wolf 2017)."""

    vocab: int
    width: int

    def __call__(self, layer: Layer) -> jax.Array:  # -> [V, D]
        return layer.matrix("table", (self.vocab, self.width), ("vocab", "embed"))


def logits(table: jax.Array, hidden: jax.Array, compute: Compute) -> jax.Array:
    """table [V, D], hidden [..., D] -> float32 [..., V]."""
    table, hidden = table.astype(compute.dtype), hidden.astype(compute.dtype)
    return compute.einsum("...d,vd->...v", hidden, table).astype(jnp.float32)
