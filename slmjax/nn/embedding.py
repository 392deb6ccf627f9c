"""Tokens to vectors, and vectors to logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import positive
from slmjax.nn.compute import Compute
from slmjax.nn.encoded import Weight, contraction
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Numerics
from slmjax.nn.parts import Norm
from slmjax.nn.position import Learned


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Token vectors from a table; then, if the model has them, a scale, a projection, learned positions, a norm."""

    vocab: int
    width: int
    context: int
    position: Learned | None = None
    scale: float = 1.0
    norm: Norm | None = None
    table_width: int | None = None

    def __call__(self, layer: Layer, tokens: jax.Array, positions: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        # Rows are looked up before the cast, so that the gradients of a frequent token add up in float32.
        x = layer.looked_up("table", (self.vocab, self.table_width or self.width), ("vocab", "embed"), tokens)
        x = x if self.scale == 1.0 else x * self.scale
        if self.table_width is not None:
            x = layer.linear("project", "btp,pd->btd", x, (self.table_width, self.width), (None, "embed"))
        if self.position is not None:
            x = x + self.position(layer, positions, self.width, self.context)
        return layer.cast(x) if self.norm is None else layer.child("norm", self.norm)(layer.cast(x))


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """A separate table of output vectors, for models that do not reuse the input table (Press & Wolf 2017)."""

    vocab: int
    width: int

    def __call__(self, layer: Layer) -> jax.Array:  # -> [V, D]
        return layer.matrix("table", (self.vocab, self.width), ("vocab", "embed"), fan_in=self.width)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A projection from the width of the blocks to the width of the output table."""

    width: int

    def __call__(self, layer: Layer, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, width]
        return layer.linear("weight", "btd,dp->btp", x, (x.shape[-1], self.width), ("embed", None))


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits: the product of hidden vectors and the output table, scaled and soft-capped."""

    scale: float = 1.0
    """Factor on the product"""
    softcap: float | None = None
    """Logits are squeezed into (-c, c): c * tanh(logit / c). Gemma 2, arXiv:2408.00118, section 2"""

    def __post_init__(self):
        positive(softcap=self.softcap)

    def __call__(self, path: str, table: Weight, hidden: jax.Array, compute: Compute, numerics: Numerics) -> jax.Array:
        """table [V, D], the parameter at `path`; hidden [..., D] -> float32 [..., V]."""
        table, hidden = table.astype(compute.dtype), hidden.astype(compute.dtype)
        y = numerics.product(path, "...d,vd->...v", hidden, table, contraction(compute.einsum)).astype(jnp.float32)
        y = y if self.scale == 1.0 else y * self.scale
        return y if self.softcap is None else self.softcap * jnp.tanh(y / self.softcap)
