"""Attention for a CPU: one batched matrix product a step over [B·H, T, K], and a backward pass written out.

The scores are computed again for the backward pass, transposed, so that each product contracts the last axis of its
left side, the only form that XLA's CPU back end runs in bfloat16 (see nn/einsum_cpu.py). What is kept is a number a
query. Dao et al. 2022, arXiv:2205.14135, section 3.1, without the tiles: at these lengths [T, T] fits the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.nn.attention_kernels import Mask, Scores, distance, reference_attention
from slmjax.nn.einsum_cpu import transpose


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """As `reference_attention`, which serves the steps of decoding. Differentiable once, in reverse mode."""
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
    scores = _masked(rule.squeezed(_dot(q, k, 2) * rule.scale), segments, slots, rule, queries_first=True)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot((weights / total).astype(q.dtype), v, 1, q.dtype)
    return out, (q, k, v, segments, slots, out, (top + jnp.log(total))[..., 0])


def _backward(rule: Scores, saved: tuple, g: jax.Array):
    q, k, v, segments, slots, out, log_total = saved
    squeezed = rule.squeezed(_dot(k, q, 2) * rule.scale)
    scores = _masked(squeezed, segments, slots, rule, queries_first=False)  # [BH, S, T], as all below
    weights = jnp.exp(scores - log_total[:, None, :])
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    ds = weights * (_dot(v, g, 2) - mean[:, None, :]) * rule.scale
    if rule.softcap is not None:  # d tanh = 1 - tanh^2
        ds = ds * (1 - jnp.square(squeezed / rule.softcap))
    ds = ds.astype(q.dtype)
    # An optimization barrier: folded into the product, this transpose would make it one that runs in a slow loop on
    # one core.
    dq = jnp.swapaxes(jax.lax.optimization_barrier(_dot(transpose(k), ds, 1, q.dtype)), 1, 2)
    dk, dv = _dot(ds, q, 1, q.dtype), _dot(weights.astype(q.dtype), g, 1, q.dtype)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _dot(x: jax.Array, y: jax.Array, axis: int, dtype: Any = jnp.float32) -> jax.Array:
    """Batched, contracting the last axis of x with `axis` of y; accumulated in float32, rounded to `dtype`."""
    return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=dtype)


def _masked(
    scores: jax.Array, segments: jax.Array, slots: jax.Array, rule: Scores, *, queries_first: bool
) -> jax.Array:
    """Scores [BH, T, T] with `rule.bias`, and the pairs that do not see each other at the least float32."""
    b, t = segments.shape
    between = distance(slots, slots) if queries_first else -distance(slots, slots)
    seen = (segments[:, :, None] == segments[:, None, :]) & rule.sees(between)
    each = scores.reshape(b, -1, t, t)
    bias = rule.bias(between)
    each = each if bias is None else each + bias
    return jnp.where(seen[:, None], each, jnp.finfo(jnp.float32).min).reshape(scores.shape)
