"""Attention for a CPU: batched matrix products over [B·H, T, K], and a backward pass of its own.

The backward pass computes the scores again, transposed, so that each product contracts the last axis of its left side,
the only form that XLA's CPU back end runs in bfloat16 (see nn/einsum_cpu.py). Of the scores only their log-sum-exp is
kept, one number for each query. Dao et al. 2022, arXiv:2205.14135, section 3.1, but in a few blocks instead of small
tiles: at these lengths their scores fit the processor's cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.nn.attention_kernels import Mask, Scores, distance, reference_attention
from slmjax.nn.einsum_cpu import transpose

BLOCK = 128
"""Tokens in a block of queries or keys, unless `MOST_BLOCKS` needs larger ones"""
MOST_BLOCKS = 4
"""Blocks in a sequence at most: each is compiled separately"""


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """`reference_attention`, faster on a CPU; decoding with a cache uses that function itself. First derivatives in
    reverse mode only.

    Slots must ascend along a row, as those of whole rows do: blocks of keys that no query sees are skipped by their
    place in the row.
    """
    if mask.start is not None:
        return reference_attention(q, k, v, mask, rule)
    b, t, heads, width = q.shape
    if k.shape[2] != heads:  # the gradient of the repetition sums over the queries that share a key
        k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(b * heads, t, width) for x in (q, k, v))
    out = _attend(rule, q, k, v, mask.query_segments, mask.query_slots)
    return jnp.swapaxes(out.reshape(b, heads, t, width), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Scores, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, slots: jax.Array) -> jax.Array:
    return _forward(rule, q, k, v, segments, slots)[0]


def _forward(rule: Scores, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, slots: jax.Array):
    outs, totals = [], []
    for lo, hi in _blocks(rule, q.shape[1]):  # queries, and the keys that the rule lets any of them see
        keys = slice(0 if rule.window is None else max(0, lo - rule.window + 1), hi if rule.causal else None)
        scores = rule.squeezed(_dot(q[:, lo:hi], k[:, keys], 2) * rule.scale)
        scores = _masked(scores, segments, slots, rule, slice(lo, hi), keys, queries_first=True)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append(_dot((weights / total).astype(q.dtype), v[:, keys], 1, q.dtype))
        totals.append((top + jnp.log(total))[..., 0])
    out = jnp.concatenate(outs, axis=1)
    return out, (q, k, v, segments, slots, out, jnp.concatenate(totals, axis=1))


def _backward(rule: Scores, saved: tuple, g: jax.Array):
    q, k, v, segments, slots, out, log_total = saved
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    t = q.shape[1]
    dqs, dks, dvs = [], [], []
    for lo, hi in _blocks(rule, t):  # keys, and the queries that may see any of them
        end = t if rule.window is None else min(t, hi + rule.window - 1)
        queries, kb, vb = slice(lo if rule.causal else 0, end), k[:, lo:hi], v[:, lo:hi]
        qb, gb = q[:, queries], g[:, queries]
        squeezed = rule.squeezed(_dot(kb, qb, 2) * rule.scale)
        scores = _masked(squeezed, segments, slots, rule, queries, slice(lo, hi), queries_first=False)  # [BH, S, T]
        weights = jnp.exp(scores - log_total[:, None, queries])
        ds = weights * (_dot(vb, gb, 2) - mean[:, None, queries]) * rule.scale
        if rule.softcap is not None:  # d tanh = 1 - tanh^2
            ds = ds * (1 - jnp.square(squeezed / rule.softcap))
        ds = ds.astype(q.dtype)
        dks.append(_dot(ds, qb, 1, q.dtype))
        dvs.append(_dot(weights.astype(q.dtype), gb, 1, q.dtype))
        part = _dot(transpose(kb), ds, 1)  # [BH, K, T] in float32, as the blocks' parts are summed
        dqs.append(jnp.pad(part, [(0, 0), (0, 0), (queries.start, t - end)]))
    # An optimization barrier: XLA would fold this transpose into the product, which then runs as a slow loop on one
    # core.
    dq = jnp.swapaxes(jax.lax.optimization_barrier(functools.reduce(jnp.add, dqs).astype(q.dtype)), 1, 2)
    return dq, jnp.concatenate(dks, axis=1), jnp.concatenate(dvs, axis=1), None, None


_attend.defvjp(_forward, _backward)


def _blocks(rule: Scores, length: int) -> list[tuple[int, int]]:
    """Where blocks of tokens begin and end. Under a causal rule most pairs of blocks need no score: with n blocks,
    (n - 1) / 2n of all."""
    n = min(MOST_BLOCKS, math.ceil(length / BLOCK)) if rule.causal else 1
    bounds = [length * i // n for i in range(n + 1)]
    return list(itertools.pairwise(bounds))


def _dot(x: jax.Array, y: jax.Array, axis: int, dtype: Any = jnp.float32) -> jax.Array:
    """Batched, contracting the last axis of x with `axis` of y; accumulated in float32, rounded to `dtype`."""
    return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=dtype)


def _masked(
    scores: jax.Array,
    segments: jax.Array,
    slots: jax.Array,
    rule: Scores,
    queries: slice,
    keys: slice,
    *,
    queries_first: bool,
) -> jax.Array:
    """Scores of these queries and keys, [BH, T, S] or [BH, S, T], plus `rule.bias`; where the query does not see the
    key, the least float32."""
    between = distance(slots[queries], slots[keys])
    seen = (segments[:, queries, None] == segments[:, None, keys]) & rule.sees(between)
    bias = rule.bias(between)
    if not queries_first:
        seen, bias = jnp.swapaxes(seen, 1, 2), None if bias is None else jnp.swapaxes(bias, 1, 2)
    each = scores.reshape(segments.shape[0], -1, *scores.shape[1:])
    each = each if bias is None else each + bias
    return jnp.where(seen[:, None], each, jnp.finfo(jnp.float32).min).reshape(scores.shape)
