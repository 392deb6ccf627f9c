"""Grouped-query self-attention with a key-value cache, and attention to keys and values of an earlier layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slmjax.errors import UserError, positive
from slmjax.nn.attention_kernels import Scores
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Cache
from slmjax.nn.parts import Flow, Mixer, Norm
from slmjax.nn.position import Position, Rope


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """Norm of queries and of keys before positions enter. Dehghani et al. 2023, arXiv:2302.05442; Henry et al. 2020."""

    norm: Norm
    gain_per_head: bool = False
    """Whether each head has its own gain, [H, K]; else all heads share one, [K]"""
    whole: bool = False
    """Whether statistics are taken over all heads together, which implies `gain_per_head`; else over each head"""

    def __call__(self, layer: Layer, name: str, x: jax.Array, heads: str) -> jax.Array:  # [B, T, H, K]
        axes = (heads, "head_dim") if self.gain_per_head or self.whole else ("head_dim",)
        return layer.child(name, self.norm)(x, axes, 2 if self.whole else 1)


@dataclass(frozen=True, kw_only=True)
class Queries(Mixer):
    """The base of every kind of attention: its queries, and how they attend to keys."""

    label: ClassVar[str] = "attn"

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    position: Position
    qk_norm: QKNorm | None = None
    scale: float | None = None
    """Factor on q·k; None: head_dim^-1/2"""
    softcap: float | None = None
    """c of the bounded scores, c * tanh(score / c); None: scores are not bounded"""
    window: int | None = None
    """How many keys a query sees, its own and those before it; None: all"""
    causal: bool = True
    """False: every token of a segment sees every other, for encoders"""

    def __post_init__(self):
        positive(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.scale)
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads: {self.kv_heads} does not divide heads = {self.heads}")
        rotated = self.position.rotated(self.head_dim) if isinstance(self.position, Rope) else None
        if rotated is not None and (rotated < 2 or rotated % 2):
            raise UserError(
                f"head_dim: {rotated} of {self.head_dim} channels are rotated; expected an even number, since rotary "
                "positions rotate pairs of channels"
            )
        for name in ("window", "softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: {value} is not positive; None for none")

    @property
    def attended_width(self) -> int:
        """heads * head_dim"""
        return self.heads * self.head_dim

    def attended_keys(self, length: int) -> float:
        """Half of the sequence if causal; fewer in a window."""
        if not self.causal:
            return length
        most = length if self.window is None else min(self.window, length)
        return most - most**2 / (2 * length)

    @property
    def rule(self) -> Scores:
        """How the scores are computed from queries and keys, and which keys are visible."""
        return Scores(
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            window=self.window,
            slopes=self.position.slopes(self.heads),
            causal=self.causal,
        )

    @property
    def table_key(self) -> Hashable:
        return self.position, self.head_dim

    def table(self, positions: jax.Array) -> Any:
        """What `position.rotate` needs for positions [B, T]: cosines and sines for `Rope`."""
        return self.position.table(positions, self.head_dim)

    def projected(self, layer: Layer, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        """x [B, T, D] -> q, k or v [B, T, H, K], before norm and position."""
        shape, axes = (x.shape[-1], heads, self.head_dim), ("embed", axis, "head_dim")
        return layer.linear(name, "btd,dhk->bthk", x, shape, axes, bias=self.qkv_bias)

    def placed(self, layer: Layer, name: str, x: jax.Array, axis: str, table: Any) -> jax.Array:
        """Queries or keys [B, T, H, K] with norm and position."""
        x = x if self.qk_norm is None else self.qk_norm(layer, f"{name}_norm", x, axis)
        return self.position.rotate(x, table)

    def attended(self, layer: Layer, q: jax.Array, k: jax.Array, v: jax.Array, flow: Flow, width: int) -> jax.Array:
        """q [B, T, H, K], k and v [B, S, G, K] -> [B, T, D]."""
        layer.collected(q=q, k=k, v=v)
        y = layer.compute.attention(q, k, v, flow.mask, self.rule)
        shape, axes = (self.heads, self.head_dim, width), ("heads", "head_dim", "embed")
        return layer.linear("o", "bthk,hkd->btd", y, shape, axes, bias=self.o_bias, residual=True)


@dataclass(frozen=True, kw_only=True)
class Attention(Queries):
    """`heads` queries share `kv_heads` keys and values. Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245."""

    shares: str | None = None
    """A name under which later layers find these keys and values (`SharedAttention.source`)"""

    def init_cache(self, batch: int, length: int, dtype: str, codec: Cache) -> dict[str, Any]:
        """An empty cache for the keys k and values v of `length` tokens, each as `codec` stores it."""
        return {name: codec.init(batch, self.kv_heads, length, self.head_dim, dtype) for name in ("k", "v")}

    def init_shared(self, batch: int, length: int, dtype: str) -> dict[str, Any]:
        """Keys and values [B, length, G, K]."""
        if self.shares is None:
            return {}
        shape = (batch, length, self.kv_heads, self.head_dim)
        return {self.shares: {name: jnp.zeros(shape, dtype) for name in ("k", "v")}}

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D], and the cache with these T tokens written in layer `depth`, slot `mask.start`."""
        q = self.projected(layer, "q", x, self.heads, "heads")
        k = self.projected(layer, "k", x, self.kv_heads, "kv_heads")
        v = self.projected(layer, "v", x, self.kv_heads, "kv_heads")
        q = self.placed(layer, "q", q, "heads", flow.table)
        k = self.placed(layer, "k", k, "kv_heads", flow.table)
        if flow.cache is not None:
            codec, start, depth = layer.numerics.cache, flow.mask.start, flow.depth
            cache = {name: codec.write(flow.cache[name], new, depth, start) for name, new in (("k", k), ("v", v))}
            # An optimization barrier: else XLA writes twice, into copies: for the attention below and for the next
            # token.
            cache = jax.lax.optimization_barrier(cache)
            k, v = (codec.read(cache[name], depth, k.dtype) for name in ("k", "v"))
            flow = flow._replace(cache=cache)
        if self.shares is not None:
            flow = flow._replace(shared={**flow.shared, self.shares: {"k": k, "v": v}})
        return self.attended(layer, q, k, v, flow, x.shape[-1]), flow


@dataclass(frozen=True, kw_only=True)
class SharedAttention(Queries):
    """Attention with its own queries to the keys and values of an earlier layer: no K and V parameters, no cache.

    Brandon et al. 2024, arXiv:2405.12981; Apple 2025, arXiv:2507.13575, section 2.1.
    """

    source: str
    """`Attention.shares` of the layer whose keys and values are used; if several layers have it, the last before this
    one"""

    def init_cache(self, batch: int, length: int, dtype: str, codec: Cache) -> dict[str, Any]:
        return {}

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D]."""
        if self.source not in flow.shared:
            raise UserError(f"source: no earlier layer shares {self.source!r}; there are: {', '.join(flow.shared)}")
        q = self.projected(layer, "q", x, self.heads, "heads")
        q = self.placed(layer, "q", q, "heads", flow.table)
        kv = flow.shared[self.source]
        return self.attended(layer, q, kv["k"], kv["v"], flow, x.shape[-1]), flow
