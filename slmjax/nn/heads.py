"""Heads: from the last layer's hidden vectors to logits, scores or vectors, each token by itself."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.encoded import Weight, values
from slmjax.nn.layer import Layer
from slmjax.nn.mlp import gelu, tanh
from slmjax.nn.parts import Norm


class Head(abc.ABC):
    """The output layer of a model. For a whole text its output is taken at one token: the first in an encoder, the last
    in a decoder (`Model.read_at`)."""

    predicts_tokens: ClassVar[bool] = False
    """Whether its outputs are logits over the vocabulary"""

    @property
    def names(self) -> tuple[str, ...]:
        """The labels that it scores; empty if it scores none"""
        return ()

    def logit_products(self, vocab: int, width: int) -> int:
        """Multiply-adds a token of the products with tables; see `Assembly.logit_products`. `width`: the model's D."""
        return 0

    @abc.abstractmethod
    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:
        """hidden [..., D], the embedding's table [V, E] -> float32 [..., X]."""


@dataclass(frozen=True, kw_only=True)
class MaskedWords(Head):
    """Logits of the masked token: norm(activation(dense(h))) times the embedding's table, plus a bias.

    Devlin et al. 2019, arXiv:1810.04805. If the table is narrower than the model, the missing columns are a parameter
    of the head (MobileBERT, Sun et al. 2020, arXiv:2004.02984).
    """

    predicts_tokens: ClassVar[bool] = True

    norm: Norm
    activation: Callable = gelu

    def logit_products(self, vocab: int, width: int) -> int:
        """V * D."""
        return vocab * width

    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:  # [..., D] -> [..., V]
        vocab, narrow = table.shape
        width = hidden.shape[-1]
        x = self.activation(_dense(layer, "transform", hidden, width))
        x = layer.child("norm", self.norm)(x)
        if narrow < width:
            rest = layer.matrix("rest", (vocab, width - narrow), ("vocab", "embed"), fan_in=width)
            table = jnp.concatenate([values(table), rest], axis=1)
        logits = layer.product("embed/table", "...d,vd->...v", x, table).astype(jnp.float32)
        return logits + layer.bias("bias", (vocab,), ("vocab",))


@dataclass(frozen=True, kw_only=True)
class Bare(Head):
    """No head: returns the hidden vectors themselves, for embeddings."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:  # [..., D] -> [..., D]
        return hidden.astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Pooler(Head):
    """tanh(dense(h)): at the first token, the vector by which BERT represents a whole sequence."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:  # [..., D] -> [..., D]
        return tanh(_dense(layer, "pool", hidden, hidden.shape[-1])).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class LabelHead(Head):
    """A score for each label of a text. Trained by `objectives.Classify`."""

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    """Names of the labels, in the order of their ids"""

    def __post_init__(self):
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise UserError(
                f"model.head.labels: {', '.join(self.labels) or 'none'}; give at least one name, and each once"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels


@dataclass(frozen=True, kw_only=True)
class Classifier(LabelHead):
    """Scores from activation(dense(h)) at the first token of a text, for encoders."""

    activation: Callable = tanh
    """relu in DistilBERT"""

    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:  # [..., D] -> [..., labels]
        x = self.activation(_dense(layer, "pool", hidden, hidden.shape[-1]))
        return _dense(layer, "classify", x, len(self.labels)).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class LastTokenScore(LabelHead):
    """Scores from one matrix, without bias, at the last token of a text, for decoders: it alone sees the whole text."""

    def __call__(self, layer: Layer, hidden: jax.Array, table: Weight) -> jax.Array:  # [..., D] -> [..., labels]
        shape = (hidden.shape[-1], len(self.labels))
        return layer.linear("score", "...d,de->...e", hidden, shape, ("embed", None)).astype(jnp.float32)


def _dense(layer: Layer, name: str, x: jax.Array, width: int) -> jax.Array:
    """[..., D] -> [..., width]."""
    return layer.linear(name, "...d,de->...e", x, (x.shape[-1], width), ("embed", None), bias=True)
