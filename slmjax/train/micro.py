"""Micro-batches: a batch is computed in pieces, one in memory at a time; the result is that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from slmjax.types import Batch, Key, Metrics, Params

LossAndGrads: TypeAlias = Callable[[Params, Batch, Key], tuple[Metrics, Any]]


def count(rows: int, length: int, *, ways: int = 1, least: int = 1, tokens: int | None = None) -> int:
    """How many micro-batches a batch of `rows` x `length` tokens is cut into.

    The largest number for which each device still has whole rows and at least `tokens` tokens of each micro-batch, but
    no fewer than `least`; `least` if `tokens` is None.

    Args:
        ways: devices over which the rows are split.
        least: `Experiment.accumulate`. Divides `rows`.
        tokens: `Compute.micro_tokens(width)`.
    """
    if tokens is None:
        return least
    whole = (n for n in range(least + 1, rows + 1) if rows % n == 0 and (rows // n) % ways == 0)
    return max((n for n in whole if rows // n // ways * length >= tokens), default=least)


def accumulated(f: LossAndGrads, params: Params, batch: Batch, key: Key, n: int) -> tuple[Metrics, Any]:
    """`f` over n micro-batches in turn, with the memory of one.

    Metrics and gradients of a micro-batch are means over its own tokens, so they are weighted by `metrics["weight"]`:
    the weighted mean is that of the whole batch, even where micro-batches differ in their number of counted tokens.
    """
    if n == 1:
        return f(params, batch, key)

    def weighted(micro: Batch, i: Any) -> tuple[Metrics, Any]:
        metrics, grads = f(params, micro, jax.random.fold_in(key, i))
        weight = metrics["weight"]
        return jax.tree.map(lambda x: x * weight, ({**metrics, "weight": 1.0}, grads))

    def body(total: Any, xs: Any) -> tuple[Any, None]:
        # An optimization barrier: else XLA repeats the slicing of the batch inside every operation that reads these
        # rows, such as the mask of each layer's attention, and on a CPU one element at a time.
        micro, i = jax.lax.optimization_barrier(xs)
        return jax.tree.map(jnp.add, total, weighted(micro, i)), None

    xs = (_split(batch, n), jnp.arange(n))
    shapes = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], xs[0]), 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (metrics, grads), _ = jax.lax.scan(body, zeros, xs)
    weight = metrics["weight"]
    metrics, grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (metrics, grads))
    return {**metrics, "weight": weight}, grads


def _split(batch: Batch, n: int) -> Batch:
    """[B, T] -> [n, B/n, T]. Micro-batch i takes rows i, i+n, ...: each device keeps the rows that it holds."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)
