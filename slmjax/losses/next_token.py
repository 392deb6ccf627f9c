"""Cross-entropy of the next token, with the logits of only some positions in memory at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.types import Metrics, Params

MAX_LOGITS = 2**22
"""Logits (16 MiB in float32) of one piece, where not all fit into one"""
MIN_TOKENS = 1024
"""Tokens of one piece nevertheless, so that its matrix products are not thin"""


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

    Where a gradient is wanted, it is formed with the loss, piece by piece: the logits are computed once, and those of
    one piece exist at a time. (Reverse mode only, once. Hsu et al. 2024, arXiv:2410.10989, section 3.2.)

    Args:
        chunk: positions of each row whose logits [B, chunk, V] exist at once. None: as many as make
            B * chunk * V <= `MAX_LOGITS`, or B * chunk <= `MIN_TOKENS` tokens, at least one; a value of T or more: all.

    Returns:
        The loss [], and metrics `loss` (cross-entropy alone), `weight` (sum of weights), `accuracy`, `z_loss`
        (mean of (log Z)^2, before the factor), each a mean over `weight`. With no weight at all everything is 0.
    """
    batch, length = targets.shape
    vocab = jax.eval_shape(unembed, params, hidden[:, :1]).shape[-1]
    size = _chunk(batch, length, vocab) if chunk is None else min(chunk, length)
    # Only the parameters that the logits depend on, so that no gradient is kept for the others.
    logits, read = jax.closure_convert(lambda h: unembed(params, h), hidden[:, :size])
    total, sums = _summed(logits, size, z_loss, hidden, targets, weights, read)
    weight = sums[3]
    mean = 1.0 / jnp.where(weight == 0, 1.0, weight)
    nll, squared, correct = sums[:3] * mean
    return total * mean, {"loss": nll, "weight": weight, "accuracy": correct, "z_loss": squared}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(logits, size, z_loss, hidden, targets, weights, read) -> tuple[jax.Array, jax.Array]:
    """(sum of w * (nll + z_loss * (log Z)^2), `_sums` [4]) over all tokens."""

    def piece(h, t, w):
        return _objective(logits, z_loss, h, t, w, read)

    if size == hidden.shape[1]:
        return piece(hidden, targets, weights)
    zero = (jnp.zeros(()), jnp.zeros(4))
    pieces = tuple(_split(x, size) for x in (hidden, targets, weights))
    return jax.lax.scan(lambda sums, xs: (jax.tree.map(jnp.add, sums, piece(*xs)), None), zero, pieces)[0]


def _objective(logits, z_loss, h, t, w, read) -> tuple[jax.Array, jax.Array]:
    sums = jnp.stack(_sums(logits(h, *read), t, w))
    return sums[0] + z_loss * sums[1], sums


def _forward(logits, size, z_loss, hidden, targets, weights, read):
    """The sums, and their gradient with respect to `hidden` and what the logits read."""

    def piece(h, t, w):
        return jax.value_and_grad(
            lambda h, read: _objective(logits, z_loss, h, t, w, read), argnums=(0, 1), has_aux=True
        )(h, read)

    if size == hidden.shape[1]:
        sums, grads = piece(hidden, targets, weights)
        return sums, grads

    def body(carry, xs):
        sums, (dh, dread) = piece(*xs)
        return jax.tree.map(jnp.add, carry, (sums, dread)), dh

    zero = ((jnp.zeros(()), jnp.zeros(4)), jax.tree.map(jnp.zeros_like, read))
    pieces = tuple(_split(x, size) for x in (hidden, targets, weights))
    (sums, dread), dh = jax.lax.scan(body, zero, pieces)
    return sums, (_join(dh, hidden.shape[1]), dread)


def _backward(logits, size, z_loss, grads, cotangents):
    g, _ = cotangents  # the sums are metrics: nothing is differentiated through them
    dh, dread = jax.tree.map(lambda x: (g * x).astype(x.dtype), grads)
    return dh, None, None, dread


_summed.defvjp(_forward, _backward)


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
    tokens = max(MAX_LOGITS // vocab, MIN_TOKENS)
    pieces = math.ceil(length / max(1, tokens // batch))
    return math.ceil(length / pieces)  # even pieces, so that little of the last is padding


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [pieces, B, size, ...], zero-padded. The batch axis stays whole, so its sharding does too."""
    b, t, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(b, -1, size, *rest), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`: [pieces, B, size, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
