"""Masked language modelling: which tokens are masked, and the loss on those alone.

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
    """Which tokens of a row are masked, and what the model sees in their place.

    Of the tokens that are neither special nor padding the share `rate` is drawn without repetition, rounded to a whole
    number of them and at least one. Each of these masked tokens is replaced by the mask token with probability `mask`,
    by a random token with probability `random`, and otherwise left as it is; the model predicts all of them.
    """

    rate: float = 0.15
    """Share of the tokens that are masked"""
    mask: float = 0.8
    """Share of the masked tokens that the mask token replaces"""
    random: float = 0.1
    """Share of the masked tokens that a random token replaces"""

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"objective.masking.rate: {self.rate} is not a share above 0 and up to 1; typical is 0.15")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1 + 1e-9:
            raise UserError(
                f"objective.masking: mask {self.mask} and random {self.random} are not shares of at most 1 together; "
                "typical are 0.8 and 0.1"
            )

    def count(self, tokens: Any) -> Any:
        """How many of `tokens` tokens are masked: rate * tokens, rounded, and at least one if there is any token."""
        return jnp.maximum(jnp.floor(self.rate * tokens + 0.5), tokens > 0)

    def most(self, length: int) -> int:
        """The largest `count` of a row of `length` tokens."""
        return max(1, math.floor(self.rate * length + 0.5))

    def __call__(self, batch: Batch, key: Key, *, vocab: int, special: Special) -> Batch:
        """The batch with tokens masked; targets are the original tokens, weights are 1 at masked tokens and 0 at all
        others.

        A function of the key and of the batch alone: the same step masks the same tokens, on any number of devices.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        if special.mask is None:
            raise UserError(
                "the tokenizer has no mask token, which a masked language model needs; build the data with a tokenizer "
                "that has one (MaskedBPE, or a tokenizer.json whose tokenizer_config.json names mask_token)"
            )
        tokens = batch.tokens
        draw_key, choice_key, random_key = jax.random.split(key, 3)
        candidates = batch.segment_ids > 0
        for i in special.all:
            candidates &= tokens != i
        score = jnp.where(candidates, jax.random.uniform(draw_key, tokens.shape), -1.0)
        rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        masked = candidates & (rank < self.count(jnp.sum(candidates, axis=1, keepdims=True)))
        choice = jax.random.uniform(choice_key, tokens.shape)
        drawn = jax.random.randint(random_key, tokens.shape, 0, vocab, tokens.dtype)
        random_or_kept = jnp.where(choice < self.mask + self.random, drawn, tokens)
        replaced = jnp.where(choice < self.mask, special.mask, random_or_kept)
        return batch._replace(
            tokens=jnp.where(masked, replaced, tokens).astype(tokens.dtype),
            targets=tokens,
            weights=masked.astype(jnp.float32),
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
    """`next_token` on the masked tokens: only their logits are computed.

    Args:
        batch: as `Masking` made it: its targets are the original tokens, its weights are 0 except at masked tokens.
        most: the largest number of masked tokens in a row (`Masking.most`); the loss leaves out any beyond it.
    """
    where = masked_positions(batch, most)
    picked = jnp.take_along_axis(hidden, where[..., None], axis=1)
    targets, weights = (jnp.take_along_axis(x, where, axis=1) for x in (batch.targets, batch.weights))
    return next_token(unembed, params, picked, targets, weights, z_loss=z_loss, chunk=chunk)


def masked_positions(batch: Batch, most: int) -> jax.Array:
    """int32 [B, most]: the positions of a row's masked tokens, and after them others, whose weight is 0."""
    return jax.lax.top_k(batch.weights, min(most, batch.weights.shape[1]))[1]
