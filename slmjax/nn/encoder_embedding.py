"""What the first layer of an encoder reads: tokens, positions and token types, under a norm."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.nn.layer import Layer
from slmjax.nn.parts import Norm
from slmjax.nn.position import Learned


@dataclass(frozen=True, kw_only=True)
class EncoderEmbedding:
    """norm(token + position + type). Devlin et al. 2019, arXiv:1810.04805, section 3."""

    vocab: int
    width: int
    context: int
    norm: Norm
    types: int
    trigram: int | None

    def __call__(
        self, layer: Layer, tokens: jax.Array, positions: jax.Array, segments: jax.Array, types: jax.Array | None
    ) -> jax.Array:  # [B, T] -> [B, T, D]
        table = layer.matrix("table", (self.vocab, self.trigram or self.width), ("vocab", "embed"))
        x = jnp.take(table, tokens, axis=0)
        x = x if self.trigram is None else self.joined(layer, x, segments)
        x = x + Learned()(layer, positions, self.width, self.context)
        if self.types:
            rows = layer.matrix("types", (self.types, self.width), ("type", "embed"))
            x = x + (rows[0] if types is None else jnp.take(rows, types, axis=0))
        return layer.child("norm", self.norm)(layer.cast(x))

    def joined(self, layer: Layer, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Vectors of the next token, this one and the one before [B, T, 3E] -> [B, T, D]."""
        # Neighbours in another document are zeros, as beyond the ends. Padding (segment 0) is seen, as stock models do.
        later = jnp.where(_near(segments, segments[:, 1:], 0), jnp.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)]), 0)
        earlier = jnp.where(_near(segments, segments[:, :-1], 1), jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)]), 0)
        three = jnp.concatenate([later, x, earlier], axis=-1)
        shape = (three.shape[-1], self.width)
        return layer.linear("project", "btp,pd->btd", three, shape, (None, "embed"), bias=True)


def _near(segments: jax.Array, neighbours: jax.Array, before: int) -> jax.Array:
    """Whether each token sees its neighbour, bool [B, T, 1]; `neighbours` [B, T - 1] lack the first (before = 1) or
    last one, which is padding."""
    neighbours = jnp.pad(neighbours, [(0, 0), (before, 1 - before)])
    return ((neighbours == segments) | (neighbours == 0))[..., None]
