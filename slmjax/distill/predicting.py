"""A teacher reads text and its predictions are computed in the form in which they are stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.distill.stored import Stored, errors
from slmjax.losses.pieces import MAX_LOGITS
from slmjax.types import Batch, Model, Params

HALF = 1 << 20
"""The position of a token is given by quotient and remainder, for a store may have more than 2^31 tokens"""


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """The compiled functions that write targets."""

    model: Model
    stored: Stored
    tokens: int
    """Ids of the tokenizer, from 0: rows of the teacher's table from there on stand for no token"""

    @functools.cached_property
    def values(self) -> Any:
        """(params, batch, index, key) -> {column: [B, T, width]}

        index: the position of each token in its split as two int32 arrays [B, T], divided by `HALF` and the remainder.
        What is drawn for a token depends on its position and the key alone.
        """

        @jax.jit
        def values(params: Params, batch: Batch, index: Any, key: Any) -> Mapping[str, jax.Array]:
            hidden = self.model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
            rows, length, width = hidden.shape

            def piece(args: Any) -> Mapping[str, jax.Array]:
                hidden, high, low = args
                keys = jax.vmap(lambda h, i: jax.random.fold_in(jax.random.fold_in(key, h), i))(high, low)
                return self.stored.values(self._log_probs(params, hidden), hidden.astype(jnp.float32), keys)

            size = max(1, min(rows * length, MAX_LOGITS // self.model.vocab))
            flat = (hidden.reshape(-1, width), *(x.reshape(-1) for x in index))
            out = jax.lax.map(piece, jax.tree.map(lambda x: _cut(x, size), flat))
            return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[: rows * length].reshape(rows, length, -1), out)

        return values

    @functools.cached_property
    def errors(self) -> Any:
        """(params, batch, at, read) -> `stored.errors` of some tokens.

        at: their rows and columns, two int arrays [n]. read: their decoded columns, each [n, ...].
        """

        @jax.jit
        def measured(params: Params, batch: Batch, at: Any, read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            hidden = self.model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
            ids, log_probs = self.stored.events(read, lambda x: self._log_probs(params, x))
            return errors(ids, log_probs, self._log_probs(params, hidden[at]))

        return measured

    def _log_probs(self, params: Params, hidden: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(self.model.unembed(params, hidden)[..., : self.tokens])


def _cut(x: jax.Array, size: int) -> jax.Array:
    """[n, ...] -> [pieces, size, ...], padded with zeros."""
    padded = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, size, *x.shape[1:])
