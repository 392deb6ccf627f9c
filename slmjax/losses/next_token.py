"""Cross-entropy of the next token, with the logits of only some positions in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.losses.logits import at, exponentials, largest
from slmjax.losses.pieces import weighted_means
from slmjax.types import Metrics, Params


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

    The z-loss keeps the logits' normaliser near 1 (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Gradients,
    memory, and tokens of weight 0: see `pieces.weighted_sums`.

    Args:
        chunk: positions of each row whose logits exist at once; None: chosen by size (`pieces.weighted_sums`).

    Returns:
        The loss [], and metrics `loss` (cross-entropy alone), `weight` (sum of weights), `accuracy`, `z_loss`
        (mean of (log Z)^2, before the factor), each a mean over `weight`. With no weight at all everything is 0.
    """
    factors = {"loss": 1.0, "z_loss": z_loss}
    return weighted_means(cross_entropy, unembed, params, hidden, targets, weights, factors=factors, chunk=chunk)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    """For logits [..., V] and targets [...], values [...]: `loss`, -log p(target) in nats; `z_loss`, (log Z)^2;
    `accuracy`, whether no token is likelier than the target."""
    most, target = largest(logits), at(logits, targets)
    log_z = exponentials(logits, most)[2]
    return {"loss": log_z - target, "z_loss": jnp.square(log_z), "accuracy": target >= most}
