"""Losses that compare what student and teacher compute inside: the base of all, and those of hidden vectors.

Each gives a value for each token that depends on the tokens of its own document (segment) alone, so that padding,
packing and micro-batches change nothing. Losses of attention are in relations.py, those of the geometry of a document's
hidden vectors in similarity.py.

Hidden vectors are numbered as in `transformers`: 0 is the embedding, m the residual stream after layer m, and that of
the last layer is what the output layer reads, after the final norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.distill.layer_maps import LayerMap, Pairs, Uniform
from slmjax.errors import UserError, positive
from slmjax.models.assembly import Assembly
from slmjax.nn.attention_kernels import Scores
from slmjax.types import Output
from slmjax.views import Matrix


class Attended(NamedTuple):
    """What the attention of one layer reads, in float32 at least."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, G, K]
    v: jax.Array  # [B, T, G, K]
    rule: Scores


class Seen(NamedTuple):
    """What one model computes for a batch."""

    output: Output
    rules: tuple[Scores | None, ...]
    """`Model.rules`, one for each layer"""

    def state(self, number: int) -> jax.Array:
        """The hidden vectors of this number, [B, T, D], in float32 at least."""
        return precise(self.output.hidden if number == len(self.rules) else self.output.blocks[number])

    def attended(self, number: int) -> Attended:
        """Queries, keys and values of layer `number`, from 1."""
        arrays = {name: precise(x) for name, x in self.output.attention[number - 1].items()}
        rule: Any = self.rules[number - 1]
        return Attended(**arrays, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Feature(ABC):
    """A loss between a layer of the student and one of the teacher, summed over the pairs of `layers`."""

    label: ClassVar[str]
    """Name of its metric"""
    reads_attention: ClassVar[bool] = False

    layers: LayerMap = field(default_factory=Uniform)
    """Which layer learns from which"""

    def check(self, student: Assembly, teacher: Assembly) -> None:
        """Checks that the two models can be compared.

        Raises:
            UserError: they cannot; the message begins with the field to change.
        """
        self.layers.pairs(student.layers, teacher.layers)

    def matrices(self, student: Assembly) -> Mapping[str, Matrix]:
        """Its trainable arrays, by name."""
        return {}

    def collects(self, student: int, teacher: int) -> bool:
        """Whether it reads more than the last hidden vectors of models with so many layers."""
        pairs: Pairs = self.layers.pairs(student, teacher)
        return self.reads_attention or any(pair != (student, teacher) for pair in pairs)

    @property
    def trains(self) -> bool:
        """Whether it has trainable arrays."""
        return False

    @abstractmethod
    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        """The loss of each token, float [B, T]; any finite value in padding.

        Args:
            pair: (layer of the student, layer of the teacher).
            segments: int32 [B, T]; 0 is padding.
            own: the arrays of `matrices`.
        """


@dataclass(frozen=True, kw_only=True)
class Projected(Feature):
    """The base of losses that compare hidden vectors channel by channel."""

    teacher_width: int | None = None
    """D' of the teacher, if a matrix W [D, D'] that is trained with the student maps its hidden vectors h to h W before
    they are compared (one matrix for all pairs of layers); None: widths are equal, and nothing is projected"""

    def __post_init__(self):
        positive(teacher_width=self.teacher_width)

    def check(self, student: Assembly, teacher: Assembly) -> None:
        pairs = self.layers.pairs(student.layers, teacher.layers)
        for m, n in pairs:
            ours, theirs = width(student, m), width(teacher, n)
            if self.teacher_width is None and ours != theirs:
                raise UserError(
                    f"teacher_width: None, but hidden vectors of the student have {ours} channels and those of the "
                    f"teacher {theirs}; set it to {theirs} for a learned projection"
                )
            if self.teacher_width not in (None, theirs):
                raise UserError(
                    f"teacher_width: {self.teacher_width}, but hidden vectors of the teacher have {theirs} channels; "
                    f"set it to {theirs}"
                )
            if self.teacher_width is not None and ours != student.width:
                raise UserError(
                    f"layers: the student's layers have {student.width} channels and its output layer reads {ours}, so "
                    f"one projection cannot map both; leave out layer {m}"
                )

    def matrices(self, student: Assembly) -> Mapping[str, Matrix]:
        if self.teacher_width is None:
            return {}
        return {"projection": Matrix(shape=(student.width, self.teacher_width), axes=("embed", None))}

    @property
    def trains(self) -> bool:
        return self.teacher_width is not None

    def states(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], own: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden vectors of both, [B, T, D'] each."""
        ours, theirs = student.state(pair[0]), teacher.state(pair[1])
        return ours @ own["projection"] if self.teacher_width is not None else ours, theirs


@dataclass(frozen=True, kw_only=True)
class HiddenMSE(Projected):
    """Mean over channels of (h W - h')^2. Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, equations 8 and 9 (with
    `layers=Embedding()`); without W: Sun et al. 2020 (MobileBERT), arXiv:2004.02984, equation 1."""

    label: ClassVar[str] = "hidden_mse"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        ours, theirs = self.states(student, teacher, pair, own)
        return jnp.mean(jnp.square(ours - theirs), axis=-1)


@dataclass(frozen=True, kw_only=True)
class HiddenCosine(Projected):
    """1 - cos(h W, h'). With `layers=Last()`: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2."""

    label: ClassVar[str] = "hidden_cosine"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        ours, theirs = self.states(student, teacher, pair, own)
        product = jnp.sum(ours * theirs, axis=-1)
        lengths = jnp.sum(jnp.square(ours), axis=-1) * jnp.sum(jnp.square(theirs), axis=-1)
        return 1.0 - product * jax.lax.rsqrt(jnp.maximum(lengths, 1e-12))


def width(model: Assembly, number: int) -> int:
    """Channels of the hidden vectors of this number."""
    of_table = getattr(model, "table_width", None)
    return of_table if number == model.layers and of_table else model.width


def precise(x: jax.Array) -> jax.Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def together(segments: jax.Array) -> jax.Array:
    """int32 [B, T] -> bool [B, T, T]: whether two tokens are of one document; never in padding."""
    return (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]


def sizes(same: jax.Array) -> jax.Array:
    """`together` -> int32 [B, T]: tokens of each token's document, 1 in padding."""
    return jnp.maximum(jnp.sum(same, axis=-1), 1)


def document_sums(values: jax.Array, same: jax.Array) -> jax.Array:
    """values [B, T] -> for each token the sum over its document, [B, T]."""
    return jnp.einsum("bts,bs->bt", same.astype(values.dtype), values)
