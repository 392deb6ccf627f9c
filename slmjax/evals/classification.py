"""Accuracy and loss of a classifier on labelled texts, with a confidence interval and a standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.errors import DataError
from slmjax.estimate import Estimate, ratio
from slmjax.losses.classify import scored
from slmjax.types import Batch, Model, Params

Z = 1.959963984540054
"""Quantile of the normal distribution for a 95% confidence interval"""


class Interval(NamedTuple):
    """A proportion and its 95% confidence interval."""

    value: float
    low: float
    high: float


class Classified(NamedTuple):
    """Accuracy and loss of a classifier, and the number of texts they were measured on."""

    accuracy: Interval
    loss: Estimate
    """Nats a text"""
    texts: int


def wilson(successes: float, n: int) -> Interval:
    """The proportion of successes with its 95% score interval (Wilson 1927), which stays inside [0, 1] and is
    right for few texts and for proportions near 1.

    Raises:
        DataError: n is 0.
    """
    if n == 0:
        raise DataError("nothing to evaluate: there is no labelled text")
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def classify(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    *,
    progress: Callable[[int], None] = lambda batches: None,
) -> Classified:
    """Runs the classifier on all batches.

    Args:
        batches: of one shape, so that the program is compiled once; `extra["labels"]` holds the right labels.
        progress: called with the number of batches done.

    Raises:
        DataError: there is no text.
    """

    @jax.jit
    def scores(params: Params, batch: Batch) -> Any:
        hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        return scored(model.unembed, params, hidden, batch, model.read_at(batch.segment_ids))

    rows = []
    for i, batch in enumerate(batches, 1):
        measured = scores(params, jax.tree.map(jnp.asarray, batch))
        rows.append(np.stack([np.asarray(x, np.float64) for x in measured], axis=1))
        progress(i)
    nats, correct, weight = np.concatenate(rows or [np.zeros((0, 3))]).T
    real = weight > 0
    accuracy = wilson(float(correct[real].sum()), int(real.sum()))
    return Classified(accuracy=accuracy, loss=ratio(nats[real], weight[real]), texts=int(real.sum()))
