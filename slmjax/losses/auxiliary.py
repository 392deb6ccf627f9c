"""Terms that parts of a model add to the loss, such as the load-balancing loss of a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.types import Metrics


def with_auxiliary(
    loss: Any, metrics: Metrics, auxiliary: Mapping[str, jax.Array], weights: jax.Array
) -> tuple[Any, Metrics]:
    """The loss plus the mean of each term over the tokens, and the metrics with these means.

    A term has a value for each token, so its mean, weighted like the loss itself, does not depend on how the batch is
    cut into micro-batches or padded.

    Args:
        loss: a mean over tokens weighted by `weights`.
        auxiliary: `Output.auxiliary`, each float32 [B, T].
        weights: float32 [B, T], `Batch.weights`.

    Raises:
        UserError: a term has the name of another metric.
    """
    total = jnp.sum(weights)
    mean = 1.0 / jnp.where(total == 0, 1.0, total)
    for name, term in auxiliary.items():
        if name in metrics:
            raise UserError(f"auxiliary: {name!r} is the name of a metric of the loss; give the term another name")
        value = jnp.sum(jnp.where(weights != 0, term, 0.0) * weights) * mean
        loss, metrics = loss + value, {**metrics, name: value}
    return loss, metrics
