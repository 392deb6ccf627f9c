"""Cross-entropy of the next token, with the logits of only some positions in memory at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.types import Metrics, Params

WHOLE = 2**25
"""Logits (128 MiB in float32) up to which they are computed whole"""
PIECE = 2**23
"""Logits (32 MiB in float32) of one piece where they are not"""


def next_token(
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    targets: jax.Array,  # int32 [B, T]
    weights: jax.Array,  # float32 [B, T]
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """Mean of -log p(target) over tokens, weighted, in nats; plus z_loss * mean of (log Z)^2.

    The z-loss keeps the logits' normaliser near 1 (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Args:
        chunk: positions of each row whose logits [B, chunk, V] exist at once; the backward pass computes them again.
            None: all if B * T * V <= `WHOLE`, else as many as make B * chunk * V <= `PIECE` (at least one).

    Returns:
        The loss [], and metrics `loss` (cross-entropy alone), `weight` (sum of weights), `accuracy`, `z_loss`
        (mean of (log Z)^2, before the factor), each a mean over `weight`. With no weight at all everything is 0.
    """
    batch, length = targets.shape
    vocab = jax.eval_shape(unembed, params, hidden[:, :1]).shape[-1]
    size = _chunk(batch, length, vocab) if chunk is None else min(chunk, length)

    def piece(h, t, w):  # -> sums [4]
        return jnp.stack(_sums(unembed(params, h), t, w))

    if size == length:
        sums = piece(hidden, targets, weights)
    else:
        pieces = tuple(_split(x, size) for x in (hidden, targets, weights))
        remat = jax.checkpoint(piece, prevent_cse=False)
        sums, _ = jax.lax.scan(lambda total, xs: (total + remat(*xs), None), jnp.zeros(4), pieces)
    weight = sums[3]
    nll, squared, correct = sums[:3] / jnp.where(weight == 0, 1.0, weight)
    return nll + z_loss * squared, {"loss": nll, "weight": weight, "accuracy": correct, "z_loss": squared}


def _sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over tokens of w * nll, w * log(Z)^2, w * (the target is the likeliest), and w."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: its gradient is no scatter, and it stays local when V is sharded.
    hit = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    correct = target >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    # Where the weight is 0 the logits may be anything, and 0 * inf would be nan.
    live = weights != 0
    log_z, target = jnp.where(live, log_z, 0.0), jnp.where(live, target, 0.0)
    return (
        jnp.sum(weights * (log_z - target)),
        jnp.sum(weights * jnp.square(log_z)),
        jnp.sum(weights * correct),
        jnp.sum(weights),
    )


def _chunk(batch: int, length: int, vocab: int) -> int:
    if batch * length * vocab <= WHOLE:
        return length
    pieces = math.ceil(length / max(1, PIECE // (batch * vocab)))
    return math.ceil(length / pieces)  # even pieces, so that little of the last is padding


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [pieces, B, size, ...], zero-padded. The batch axis stays whole, so its sharding does too."""
    b, t, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(b, -1, size, *rest), 1, 0)
