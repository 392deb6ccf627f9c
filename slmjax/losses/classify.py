"""Cross-entropy of the label of a whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.types import Batch, Metrics, Params


class Scored(NamedTuple):
    """Loss and accuracy of a classifier on each text."""

    nats: jax.Array  # float32 [B]: -log p(label); 0 in rows of padding
    correct: jax.Array  # float32 [B]: 1 where the label is the likeliest
    weight: jax.Array  # float32 [B]: 1, or 0 in rows of padding


def scored(
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    batch: Batch,
    at: jax.Array,  # int [B]
) -> Scored:
    """The values of each text, one text a row.

    Args:
        batch: with `extra["labels"]`, int32 [B]; the weight of a row is the sum of its tokens' weights.
        at: the index of the token whose hidden vector the head reads (`Model.read_at`).
    """
    read = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    logits = unembed(params, read)  # [B, labels]
    weight = batch.weights.sum(axis=1)
    log_p = jax.nn.log_softmax(logits)
    hit = jnp.arange(logits.shape[-1]) == batch.extra["labels"][:, None]
    nats = -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1)
    of_label = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    correct = (of_label >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)).astype(jnp.float32)
    live = weight != 0  # in padding the logits may be anything, and 0 * inf would be nan
    return Scored(jnp.where(live, nats, 0.0), jnp.where(live, correct, 0.0), weight)


def classify(
    unembed: Callable[[Params, Any], Any], params: Params, hidden: jax.Array, batch: Batch, at: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Mean of -log p(label) over texts, weighted, in nats a text. Arguments as those of `scored`.

    Returns:
        The loss [], and metrics `loss`, `accuracy` and `weight` (texts). With no text at all everything is 0.
    """
    nats, correct, weight = scored(unembed, params, hidden, batch, at)
    total = jnp.sum(weight)
    mean = 1.0 / jnp.where(total == 0, 1.0, total)
    loss = jnp.sum(nats * weight) * mean
    return loss, {"loss": loss, "accuracy": jnp.sum(correct * weight) * mean, "weight": total}
