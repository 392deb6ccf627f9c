"""Loss, perplexity and bits per byte of a model on a stream of batches, each with its standard error.

All three are ratios of sums over tokens, and tokens of one sequence are not independent, so the sequences (rows of the
batches) are the sampling units: with s_i the nats of row i and w_i its weight, the loss is L = sum s / sum w, and its
standard error that of a ratio estimator (Cochran 1977, section 6.3; the same as cluster-robust in a regression on a
constant):

    SE(L)^2 = n/(n-1) * sum_i (s_i - L w_i)^2 / (sum_i w_i)^2

Bits per byte is sum s / (ln 2 * sum bytes), with the analogous error. Perplexity is exp L, its error exp(L) * SE(L) by
the delta method. The errors are of sampling text for this model: not of the training seed. Pieces of one long document
in different rows count as independent, so for documents much longer than a row the errors are too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.errors import DataError
from slmjax.estimate import Estimate, ratio
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import MAX_LOGITS, token_values
from slmjax.types import Batch, Key, Model, Params, unchanged


class Result(NamedTuple):
    """Measured figures, and the amount of text they were measured on."""

    loss: Estimate
    """Nats a token"""
    perplexity: Estimate
    """exp(loss)"""
    bits_per_byte: Estimate | None
    """Bits per byte of UTF-8 text, comparable between tokenizers. None if the bytes of tokens are not given"""
    tokens: float
    """Sum of the weights"""
    bytes: float
    sequences: int
    """Rows with at least one token of weight > 0"""


def row_sums(
    model: Model, sizes: Sequence[int], prepare: Callable[[Batch, Key], Batch] = unchanged
) -> Callable[[Params, Batch, Key], Any]:
    """The jitted (params, batch, key) -> float32 [B, 3]: nats, weight and bytes of each row.

    `sizes` gives each token's bytes; ids beyond it (padding of the vocabulary) have none. `prepare`: see `evaluate`.
    """
    table = np.zeros(model.vocab, np.float32)
    table[: len(sizes)] = sizes[: model.vocab]

    def sums(params: Params, batch: Batch, key: Key) -> jax.Array:
        batch = prepare(batch, key)
        hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        rows, length = batch.tokens.shape
        chunk = max(1, min(length, MAX_LOGITS // (rows * model.vocab)))
        values = token_values(cross_entropy, model.unembed, params, hidden, batch.targets, batch.weights, chunk=chunk)
        counted = (values["loss"], jnp.ones_like(values["loss"]), jnp.asarray(table)[batch.targets])
        return jnp.stack([jnp.sum(batch.weights * x, axis=1) for x in counted], axis=1)

    return jax.jit(sums)


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    *,
    token_bytes: Sequence[int] = (),
    prepare: Callable[[Batch, Key], Batch] = unchanged,
    progress: Callable[[int], None] = lambda batches: None,
) -> Result:
    """Evaluates a model on all batches; sums are kept in float64.

    Args:
        batches: of one shape, so that the program is compiled once.
        token_bytes: bytes of text that each token stands for (`text.token_bytes`).
        prepare: (batch, key) -> the batch that the model reads, with its targets and weights
            (`Assembly.evaluation_batch`). The key depends on the number of the batch alone.
        progress: called with the number of batches done.

    Raises:
        DataError: no token has a weight.
    """
    sums = row_sums(model, token_bytes, prepare)
    key, rows = jax.random.key(0), []
    waiting = None  # results are fetched one batch late, so that the device already computes the next one
    for i, batch in enumerate(batches):
        now = sums(params, jax.tree.map(jnp.asarray, batch), jax.random.fold_in(key, i))
        if waiting is not None:
            rows.append(np.asarray(waiting, np.float64))
        waiting = now
        progress(i + 1)
    if waiting is not None:
        rows.append(np.asarray(waiting, np.float64))
    return summarise(np.concatenate(rows) if rows else np.zeros((0, 3)))


def summarise(rows: np.ndarray) -> Result:
    """[n, 3] sums of nats, weight and bytes a row -> the figures. Rows without weight are padding.

    Raises:
        DataError: the sum of all weights is 0.
    """
    rows = rows[rows[:, 1] > 0]
    if len(rows) == 0:
        raise DataError("nothing to evaluate: no batch holds a token with a target")
    nats, weight, size = rows.T
    loss = ratio(nats, weight)
    perplexity = Estimate(_exp(loss.value), _exp(loss.value) * loss.se)
    return Result(
        loss=loss,
        perplexity=perplexity,
        bits_per_byte=ratio(nats / math.log(2), size) if size.sum() > 0 else None,
        tokens=float(weight.sum()),
        bytes=float(size.sum()),
        sequences=len(rows),
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
