"""What stands on the last layer: from hidden vectors to logits, each token alone."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.layer import Layer
from slmjax.nn.mlp import gelu, tanh
from slmjax.nn.parts import Norm


class Head(abc.ABC):
    """Reads the last layer. A head that describes a whole text is read at one of its tokens: the first of an encoder,
    the last of a decoder (`Model.read_at`)."""

    words: ClassVar[bool] = False
    """Whether it tells which word stands at a token"""

    @property
    def names(self) -> tuple[str, ...]:
        """The labels that it scores; empty if it scores none"""
        return ()

    def logit_products(self, vocab: int, width: int) -> int:
        """Multiply-adds of a token with tables of words; see `Assembly.logit_products`. `width`: D of the model."""
        return 0

    @abc.abstractmethod
    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:
        """hidden [..., D], the embedding's table [V, E] -> float32 [..., X]."""


@dataclass(frozen=True, kw_only=True)
class MaskedWords(Head):
    """Which word stands here: norm(activation(dense(h))) times the embedding's table, plus a bias.

    Devlin et al. 2019, arXiv:1810.04805. Where the table is narrower than the model, the other columns are a table of
    their own (MobileBERT, Sun et al. 2020, arXiv:2004.02984).
    """

    words: ClassVar[bool] = True

    norm: Norm
    activation: Callable = gelu

    def logit_products(self, vocab: int, width: int) -> int:
        """V * D."""
        return vocab * width

    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:  # [..., D] -> [..., V]
        vocab, narrow = table.shape
        width = hidden.shape[-1]
        x = self.activation(_dense(layer, "transform", hidden, width))
        x = layer.child("norm", self.norm)(x)
        if narrow < width:
            rest = layer.matrix("rest", (vocab, width - narrow), ("vocab", "embed"))
            table = jnp.concatenate([table, rest], axis=1)
        logits = layer.compute.einsum("...d,vd->...v", layer.cast(x), layer.cast(table)).astype(jnp.float32)
        return logits + layer.bias("bias", (vocab,), ("vocab",))


@dataclass(frozen=True, kw_only=True)
class Bare(Head):
    """Nothing: the hidden vectors themselves, for embeddings."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        return hidden.astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Pooler(Head):
    """tanh(dense(h)): what BERT was trained to tell of a whole sequence at its first token."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        return tanh(_dense(layer, "pool", hidden, hidden.shape[-1])).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class LabelHead(Head):
    """A score for each label of a text. Trained by `objectives.Classify`."""

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    """Their names, in the order of their numbers"""

    def __post_init__(self):
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise UserError(f"model.head.labels: {', '.join(self.labels) or 'none'}; give names that differ")

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels


@dataclass(frozen=True, kw_only=True)
class Classifier(LabelHead):
    """Scores from activation(dense(h)) at the first token of a text, for encoders."""

    activation: Callable = tanh
    """relu in DistilBERT"""

    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:  # [..., D] -> [..., labels]
        x = self.activation(_dense(layer, "pool", hidden, hidden.shape[-1]))
        return _dense(layer, "classify", x, len(self.labels), out=None).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class LastTokenScore(LabelHead):
    """Scores from one matrix, without bias, at the last token of a text, for decoders: the one that has seen all."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: jax.Array) -> jax.Array:  # [..., D] -> [..., labels]
        weight = layer.matrix("score", (hidden.shape[-1], len(self.labels)), ("embed", None))
        return layer.linear("...d,de->...e", hidden, weight).astype(jnp.float32)


def _dense(layer: Layer, name: str, x: jax.Array, width: int, out: str | None = "embed") -> jax.Array:
    """[..., D] -> [..., width]."""
    weight = layer.matrix(name, (x.shape[-1], width), ("embed", None))
    return layer.linear("...d,de->...e", x, weight, layer.bias(f"{name}_bias", (width,), (out,)))
