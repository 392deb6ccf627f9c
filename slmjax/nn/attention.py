"""Grouped-query self-attention with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.layer import Layer
from slmjax.nn.parts import Mixer
from slmjax.nn.position import NoPosition, Rope


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """`heads` queries share `kv_heads` keys and values. Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245."""

    label: ClassVar[str] = "attn"

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    position: Rope | NoPosition
    scale: float | None = None
    """Factor on q·k; None: head_dim^-1/2"""

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"kv_heads: {self.kv_heads} does not divide heads = {self.heads}")
        if isinstance(self.position, Rope) and self.head_dim % 2:
            raise UserError(f"head_dim: {self.head_dim} is odd, and rotary positions pair its channels")

    @property
    def attended_width(self) -> int:
        """heads * head_dim"""
        return self.heads * self.head_dim

    def table(self, positions: jax.Array) -> Any:
        """What `position` needs of positions [B, T]: sines and cosines for `Rope`."""
        return self.position.table(positions, self.head_dim)

    def init_cache(self, batch: int, length: int, dtype: str) -> dict[str, jax.Array]:
        """Room for the keys and values of `length` tokens, k and v [B, length, G, K]."""
        shape = (batch, length, self.kv_heads, self.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(
        self, layer: Layer, x: jax.Array, table: Any, mask: Mask, cache: dict[str, jax.Array] | None, depth: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """x [B, T, D] -> [B, T, D], and the cache with these T tokens written in layer `depth`, slot `mask.start`."""
        width = x.shape[-1]
        q = self._project(layer, "q", x, self.heads, "heads")
        k = self._project(layer, "k", x, self.kv_heads, "kv_heads")
        v = self._project(layer, "v", x, self.kv_heads, "kv_heads")
        q, k = self.position.rotate(q, table), self.position.rotate(k, table)
        if cache is not None:
            cache = {name: _write(cache[name], new, depth, mask.start) for name, new in (("k", k), ("v", v))}
            k, v = (jax.lax.dynamic_index_in_dim(cache[name], depth, keepdims=False) for name in ("k", "v"))
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        y = layer.compute.attention(q, k, v, mask, scale)
        o = layer.matrix("o", (self.heads, self.head_dim, width), ("heads", "head_dim", "embed"), residual=True)
        bias = layer.bias("o_bias", (width,), ("embed",)) if self.o_bias else None
        return layer.linear("bthk,hkd->btd", y, o, bias), cache

    def _project(self, layer: Layer, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        weight = layer.matrix(name, (x.shape[-1], heads, self.head_dim), ("embed", axis, "head_dim"))
        bias = layer.bias(f"{name}_bias", (heads, self.head_dim), (axis, "head_dim")) if self.qkv_bias else None
        return layer.linear("btd,dhk->bthk", x, weight, bias)


def _write(stack: jax.Array, new: jax.Array, depth: jax.Array, start: jax.Array) -> jax.Array:
    """stack [L, B, S, G, K] with new [B, T, G, K] at layer `depth` from slot `start` on."""
    return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], (depth, 0, start, 0, 0))
