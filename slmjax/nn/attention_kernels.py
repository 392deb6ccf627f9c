"""Scaled dot-product attention inside segments, as interchangeable functions for `Compute.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How the weight of a key follows from its product with a query; the same for all tokens."""

    scale: float
    """Factor on q·k"""
    softcap: float | None = None
    """Scores are squeezed into (-c, c): c * tanh(score / c). Gemma 2, arXiv:2408.00118, section 2"""
    window: int | None = None
    """How many keys a query sees, its own and those before it; None: all. Beltagy et al. 2020, arXiv:2004.05150"""
    slopes: tuple[float, ...] | None = None
    """For each head, the penalty for each token of distance. Press et al. 2021 (ALiBi), arXiv:2108.12409"""
    causal: bool = True
    """Whether later keys are hidden"""

    def squeezed(self, scores: jax.Array) -> jax.Array:
        """The scores after the soft cap."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def sees(self, distance: jax.Array) -> jax.Array:
        """distance int [...], slots from the key up to the query -> bool [...], whether the query sees the key."""
        visible = distance >= 0 if self.causal else jnp.ones_like(distance, bool)
        return visible if self.window is None else visible & (distance < self.window)

    def bias(self, distance: jax.Array) -> jax.Array | None:
        """distance [T, S] -> float32 [H, T, S], added to the scores; None without slopes."""
        if self.slopes is None:
            return None
        return distance.astype(jnp.float32) * -jnp.asarray(self.slopes, jnp.float32)[:, None, None]


class Mask(NamedTuple):
    """Which keys a query may see: those of its own segment. `Scores` may hide more of them, by distance.

    The slot of a token is its place in the whole row. A device that holds a part of each row's tokens gives their
    slots, in whatever order they lie.
    """

    query_segments: Any  # int32 [B, T]
    key_segments: Any  # int32 [B, S]
    query_slots: Any  # int32 [T]
    key_slots: Any  # int32 [S]
    start: Any = None  # int32 []: where in the cache the queries' own keys are; None: there is no cache

    @classmethod
    def of_rows(cls, segments: jax.Array) -> Mask:
        """The mask of whole rows, whose segment ids are `segments` [B, T]: queries and keys are the same tokens."""
        slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
        return cls(segments, segments, slots, slots)

    @classmethod
    def of_cache(cls, segments: jax.Array, cached: jax.Array, start: jax.Array) -> Mask:
        """The mask of new tokens with segment ids `segments` [B, T], which lie from slot `start` on in a cache with
        segment ids `cached` [B, S]."""
        slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
        return cls(segments, cached, slots + start, jnp.arange(cached.shape[1], dtype=jnp.int32), start)

    def distance(self) -> jax.Array:
        """int32 [T, S]: slots from the key up to the query; inside a segment, tokens."""
        return distance(self.query_slots, self.key_slots)

    def dense(self, rule: Scores) -> jax.Array:
        """Bool [B, T, S]. Every query sees at least itself, even in padding, so that each softmax has a term."""
        return rule.sees(self.distance()) & (self.query_segments[:, :, None] == self.key_segments[:, None, :])


def distance(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Slots int32 [T] and [S] -> int32 [T, S], from the key up to the query."""
    return queries[:, None] - keys[None, :]


def grouped_scores(q: jax.Array, k: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """The scores before the softmax, also of keys that are not visible, in float32 (float64 for float64).

    q [B, T, H, K], k [B, S, G, K] -> [B, G, H / G, T, S]; the first H / G of the H heads read the
    first of the G keys, and so on.
    """
    b, t, h, e = q.shape
    groups = k.shape[2]
    q = q.reshape(b, t, groups, h // groups, e)
    precision = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgre,bsge->bgrts", q, k, preferred_element_type=precision) * rule.scale
    scores = rule.squeezed(scores)
    bias = rule.bias(mask.distance())
    return scores if bias is None else scores + bias.reshape(groups, h // groups, *bias.shape[1:])


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """softmax(scale * q k^T) v by its definition, scores and softmax in float32. Vaswani et al. 2017, arXiv:1706.03762.

    q [B, T, H, K]; k, v [B, S, G, K], G dividing H (Ainslie et al. 2023, arXiv:2305.13245) -> [B, T, H, K]
    """
    b, t, h, e = q.shape
    scores = grouped_scores(q, k, mask, rule)
    scores = jnp.where(mask.dense(rule)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    values = jnp.einsum("bgrts,bsge->bgrte", weights, v)  # in this order of axes it is a batched matrix product
    return values.transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """`jax.nn.dot_product_attention` as XLA compiles it: any device, any dtype. Shapes as `reference_attention`."""
    return _library(q, k, v, mask, rule, "xla")


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores) -> jax.Array:
    """cuDNN's fused attention on a GPU in half precision, else XLA's. Shapes as `reference_attention`."""
    # cuDNN 9 needs half precision, a head width that is a multiple of 8 up to 128, and more than one query.
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] > 1
    return _library(q, k, v, mask, rule, "cudnn" if fits and jax.default_backend() == "gpu" else "xla")


def _library(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Scores, implementation: Any) -> jax.Array:
    if rule.softcap is not None:  # jax.nn.dot_product_attention has no soft cap
        return reference_attention(q, k, v, mask, rule)
    bias = rule.bias(mask.distance())
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if bias is None else bias[None].astype(q.dtype),
        mask=mask.dense(rule)[:, None],
        scale=rule.scale,
        implementation=implementation,
    )
