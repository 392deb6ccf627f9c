"""Text embeddings: the mean of the last layer over a text's tokens, divided by its norm.

Reimers & Gurevych 2019, arXiv:1908.10084; what sentence-transformers computes with mean pooling and normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.types import Model, Params

STEP = 16
"""Lengths are rounded up to multiples of it, so that few programs are compiled"""


def embed(
    model: Model, params: Params, tokenizer: Tokenizer, texts: Sequence[str], *, length: int, batch: int = 32
) -> np.ndarray:
    """Texts -> embeddings float32 [N, D] of norm 1; the scalar product of two is their cosine similarity.

    Args:
        length: maximum tokens of a text, BOS and EOS (BERT's [CLS] and [SEP]) included; the rest is cut off.
        batch: texts embedded at a time.

    Raises:
        UserError: no text, a text without a token, or `length` beyond the model's context.
    """
    if not 2 < length <= model.context:
        raise UserError(f"length is {length}; expected 3 to the model's context, {model.context} tokens")
    if not texts:
        raise UserError("no text to embed; give at least one")
    ids = [cut(tokenizer.encode(text, bos=True, eos=True), length, tokenizer.eos_id is not None) for text in texts]
    if not all(ids):
        raise UserError(f"text {[bool(row) for row in ids].index(False)} has no token; expected some text")
    run = jax.jit(lambda params, tokens, mask: pooled(model, params, tokens, mask))
    vectors: list[np.ndarray | None] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = min(model.context, STEP * math.ceil(max(len(ids[i]) for i in rows) / STEP))
        tokens = np.zeros((min(batch, len(ids)), width), np.int32)
        mask = np.zeros_like(tokens)
        for row, i in enumerate(rows):
            tokens[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
        embedded = np.asarray(run(params, tokens, mask))
        for row, i in enumerate(rows):
            vectors[i] = embedded[row]
    return np.stack([v for v in vectors if v is not None])


def pooled(model: Model, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Tokens and mask [B, T], padded on the right -> float32 [B, D] of norm 1."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model.apply(params, tokens, positions, mask).hidden.astype(jnp.float32)
    mean = jnp.sum(hidden * mask[..., None], axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def cut(ids: list[int], length: int, closed: bool) -> list[int]:
    """At most `length` ids. `closed`: the last id is EOS and is kept."""
    if len(ids) <= length:
        return ids
    return [*ids[: length - 1], ids[-1]] if closed else ids[:length]
