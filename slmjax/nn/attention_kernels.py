"""Scaled dot-product attention inside segments, as interchangeable functions: a `Compute.attention` value each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """Which keys a query sees: those of its own segment that are not later than itself."""

    query_segments: Any  # int32 [B, T]
    key_segments: Any  # int32 [B, S]
    start: Any = None  # int32 []: the slot of query 0 among the keys; None: queries and keys are the same tokens

    def dense(self) -> jax.Array:
        """Bool [B, T, S]. Every query sees itself, padding too, so no softmax is over nothing."""
        queries = jnp.arange(self.query_segments.shape[1]) + (0 if self.start is None else self.start)
        causal = jnp.arange(self.key_segments.shape[1])[None, :] <= queries[:, None]
        return causal & (self.query_segments[:, :, None] == self.key_segments[:, None, :])


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """softmax(scale * q k^T) v as it is written, scores and softmax in float32. Vaswani et al. 2017, arXiv:1706.03762.

    q [B, T, H, K]; k, v [B, S, G, K], G dividing H (Ainslie et al. 2023, arXiv:2305.13245) -> [B, T, H, K]
    """
    b, t, h, e = q.shape
    groups = k.shape[2]
    q = q.reshape(b, t, groups, h // groups, e)
    scores = jnp.einsum("btgre,bsge->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask.dense()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsge->btgre", weights, v).reshape(b, t, h, e)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """`jax.nn.dot_product_attention` as XLA compiles it: any device, any dtype. Shapes as `reference_attention`."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense()[:, None], scale=scale, implementation="xla")


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """cuDNN's fused attention on a GPU in half precision, else XLA's. Shapes as `reference_attention`."""
    # cuDNN 9 takes half precision, head widths in multiples of 8 up to 128, and wants more than one query.
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] > 1
    fused = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense()[:, None], scale=scale, implementation=fused)
