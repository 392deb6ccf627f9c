"""Masked language modelling: which tokens are hidden, and the loss on those alone.

Devlin et al. 2019, arXiv:1810.04805, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.losses.next_token import next_token
from slmjax.types import Batch, Key, Metrics, Params, Special


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Of the tokens of a row that are neither special nor padding, `rate` are asked for, at least one: so many exactly,
    drawn without repetition. Of these the share `mask` is replaced by the mask token, `random` by any token, and the
    rest stays as it is."""

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"objective.masking.rate: {self.rate} is not a share above 0 and up to 1; typical is 0.15")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1 + 1e-9:
            raise UserError(
                f"objective.masking: mask {self.mask} and random {self.random} are not shares of at most 1 together; "
                "typical are 0.8 and 0.1"
            )

    def count(self, tokens: Any) -> Any:
        """How many of so many tokens are asked for: rate * tokens, rounded, at least one of one."""
        return jnp.maximum(jnp.floor(self.rate * tokens + 0.5), tokens > 0)

    def most(self, length: int) -> int:
        """The largest `count` of a row of `length` tokens."""
        return max(1, math.floor(self.rate * length + 0.5))

    def __call__(self, batch: Batch, key: Key, *, vocab: int, special: Special) -> Batch:
        """The batch with tokens hidden; targets are the tokens that were there, weights 1 where they are asked for.

        A function of the key and of the batch alone: the same step hides the same tokens, on any number of devices.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        if special.mask is None:
            raise UserError(
                "the tokenizer has no mask token, which a masked language model needs; build the data with a tokenizer "
                "that has one (MaskedBPE, or a tokenizer.json whose tokenizer_config.json names mask_token)"
            )
        tokens = batch.tokens
        draw, replace, word = jax.random.split(key, 3)
        free = batch.segment_ids > 0
        for i in special.all:
            free &= tokens != i
        score = jnp.where(free, jax.random.uniform(draw, tokens.shape), -1.0)
        rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        asked = free & (rank < self.count(jnp.sum(free, axis=1, keepdims=True)))
        by = jax.random.uniform(replace, tokens.shape)
        words = jax.random.randint(word, tokens.shape, 0, vocab, tokens.dtype)
        shown = jnp.where(by < self.mask, special.mask, jnp.where(by < self.mask + self.random, words, tokens))
        return batch._replace(
            tokens=jnp.where(asked, shown, tokens).astype(tokens.dtype),
            targets=tokens,
            weights=asked.astype(jnp.float32),
        )


def masked_lm(
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    batch: Batch,
    most: int,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """`next_token` of the tokens that are asked for: only their logits are computed.

    Args:
        batch: as `Masking` made it: at most `most` weights of a row are not 0.
    """
    _, where = jax.lax.top_k(batch.weights, min(most, batch.weights.shape[1]))  # [B, most]
    picked = jnp.take_along_axis(hidden, where[..., None], axis=1)
    targets, weights = (jnp.take_along_axis(x, where, axis=1) for x in (batch.targets, batch.weights))
    return next_token(unembed, params, picked, targets, weights, z_loss=z_loss, chunk=chunk)
