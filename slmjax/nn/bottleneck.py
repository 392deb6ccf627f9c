"""The layer of MobileBERT: narrow inside, wide between layers. Sun et al. 2020, arXiv:2004.02984, section 3.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.errors import positive
from slmjax.nn.attention import Queries
from slmjax.nn.block import AnyBlock
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Cache
from slmjax.nn.parts import Flow, Norm


@dataclass(frozen=True, kw_only=True)
class Affine(Norm):
    """x * scale + bias, without statistics ("NoNorm")."""

    def __call__(self, layer: Layer, x: jax.Array, axes: tuple[str, ...] = ("embed",), over: int = 1) -> jax.Array:
        shape = x.shape[-len(axes) :]
        return layer.cast(x.astype(jnp.float32) * layer.gain("scale", shape, axes) + layer.bias("bias", shape, axes))


@dataclass(frozen=True, kw_only=True)
class SplitAttention(Queries):
    """Queries and keys from one input, values from another."""

    def init_cache(self, batch: int, length: int, dtype: str, codec: Cache) -> dict[str, Any]:
        """An empty cache: encoders have none."""
        return {}

    def __call__(self, layer: Layer, x: Any, flow: Flow) -> tuple[jax.Array, Flow]:
        """x: ([B, T, D] for queries and keys, [B, T, E] for values) -> [B, T, D]."""
        read, full = x
        q = self.placed(layer, "q", self.projected(layer, "q", read, self.heads, "heads"), "heads", flow.table)
        k = self.placed(layer, "k", self.projected(layer, "k", read, self.kv_heads, "kv_heads"), "kv_heads", flow.table)
        v = self.projected(layer, "v", full, self.kv_heads, "kv_heads")
        return self.attended(layer, q, k, v, flow, read.shape[-1]), flow


@dataclass(frozen=True, kw_only=True)
class Bottleneck(AnyBlock):
    """Attention and `feeds` feed-forward layers on `inner` channels, each with a residual and a norm; then back to the
    full width, where the layer's input is added."""

    inner: int
    feeds: int = 4

    def __post_init__(self):
        positive(inner=self.inner, feeds=self.feeds)

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        narrow = self.narrowed(layer, "narrow", x)
        read = self.narrowed(layer, "read", x)
        y, flow = layer.child(self.mixer.label, self.mixer)((read, x), flow)
        y = self.normed(layer, f"{self.mixer.label}_norm", self.added(narrow, y))
        for i in range(self.feeds):
            out, flow = layer.child(f"mlp_{i}", self.mlp)(y, flow)
            y = self.normed(layer, f"mlp_{i}_norm", self.added(y, out))
        shape = (self.inner, x.shape[-1])
        y = layer.linear("widen", "btp,pd->btd", y, shape, (None, "embed"), bias=True, residual=True)
        return self.normed(layer, "out_norm", self.added(x, y)), flow

    def narrowed(self, layer: Layer, name: str, x: jax.Array) -> jax.Array:
        """norm(dense(x)), [B, T, D] -> [B, T, inner]."""
        y = layer.linear(name, "btd,dp->btp", x, (x.shape[-1], self.inner), ("embed", None), bias=True)
        return self.normed(layer, f"{name}_norm", y)
