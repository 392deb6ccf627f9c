"""The input of an encoder's first layer: the normed sum of token, position and token type vectors."""

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
        x = layer.looked_up("table", (self.vocab, self.trigram or self.width), ("vocab", "embed"), tokens)
        x = x if self.trigram is None else self.joined(layer, x, segments)
        x = x + Learned()(layer, positions, self.width, self.context)
        if self.types:
            rows = layer.matrix("types", (self.types, self.width), ("type", "embed"))
            x = x + (rows[0] if types is None else jnp.take(rows, types, axis=0))
        return layer.child("norm", self.norm)(layer.cast(x))

    def joined(self, layer: Layer, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Vectors of the next token, this one and the one before [B, T, 3E] -> [B, T, D]."""
        # Neighbours in another document count as zeros, like those beyond the ends. Padding (segment 0) is read, as
        # transformers does.
        later = jnp.where(_reads(segments, segments[:, 1:], 0), jnp.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)]), 0)
        earlier = jnp.where(_reads(segments, segments[:, :-1], 1), jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)]), 0)
        three = jnp.concatenate([later, x, earlier], axis=-1)
        shape = (three.shape[-1], self.width)
        return layer.linear("project", "btp,pd->btd", three, shape, (None, "embed"), bias=True)


def _reads(segments: jax.Array, neighbours: jax.Array, before: int) -> jax.Array:
    """Whether each token reads its neighbour's vector, bool [B, T, 1]. `neighbours` [B, T - 1]: segment ids of the
    neighbours; the first token (before = 1) or the last one has none, which counts as padding."""
    neighbours = jnp.pad(neighbours, [(0, 0), (before, 1 - before)])
    return ((neighbours == segments) | (neighbours == 0))[..., None]
