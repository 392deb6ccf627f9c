"""Losses of attention: its scores, its probabilities, and relations between queries, keys or values.

Only keys that a query sees count: those of its own document, and in a causal model not the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slmjax.distill.features import Attended, Feature, Seen
from slmjax.errors import UserError, positive
from slmjax.losses.divergences import kl
from slmjax.models.assembly import Assembly
from slmjax.nn.attention import Queries
from slmjax.nn.attention_kernels import Mask, Scores, grouped_scores

LOWEST = -100.0
"""Scores at or below it count as 0 in `AttentionScores`: they stand for keys that are masked or given no weight"""


@dataclass(frozen=True, kw_only=True)
class OfAttention(Feature):
    """The base of losses that compare attention."""

    reads_attention: ClassVar[bool] = True

    def check(self, student: Assembly, teacher: Assembly) -> None:
        mixers: list[list[Any]] = [[block.mixer for block in model.blocks()] for model in (student, teacher)]
        for pair in self.layers.pairs(student.layers, teacher.layers):
            for who, of, number in zip(("student", "teacher"), mixers, pair, strict=True):
                if number == 0 or not isinstance(of[number - 1], Queries):
                    raise UserError(
                        f"layers: layer {number} of the {who} has no attention; choose other layers by Explicit(to=...)"
                    )
            ours, theirs = (of[number - 1] for of, number in zip(mixers, pair, strict=True))
            self.compare(ours, theirs, pair)

    def compare(self, ours: Queries, theirs: Queries, pair: tuple[int, int]) -> None:
        """Checks one pair of layers. By default: equally many heads, which see equally many keys.

        Raises:
            UserError: they cannot be compared.
        """
        _equal("heads", ours.heads, theirs.heads, pair, "use Relations(heads=...), which compares any numbers of heads")
        _equal("window", ours.window, theirs.window, pair, "choose other layers by Explicit(to=...)")


@dataclass(frozen=True, kw_only=True)
class AttentionScores(OfAttention):
    """Mean over heads and visible keys of (A - A')^2, where A are the scores before the softmax: scale * q k^T, with
    soft cap and bias where the model has them; values of -100 and below count as 0. Jiao et al. 2020 (TinyBERT),
    arXiv:1909.10351, equation 7, and the published code. Both models need the same number of heads."""

    label: ClassVar[str] = "attention_mse"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        ours, theirs = (x.attended(number) for x, number in zip((student, teacher), pair, strict=True))
        kept = [jnp.where(s <= LOWEST, 0.0, s) for s in (_scores(ours, segments), _scores(theirs, segments))]
        visible = Mask.of_rows(segments).dense(ours.rule)
        squares = jnp.where(visible, jnp.mean(jnp.square(kept[0] - kept[1]), axis=1), 0.0)
        return jnp.sum(squares, axis=-1) / jnp.sum(visible, axis=-1)


@dataclass(frozen=True, kw_only=True)
class AttentionKL(OfAttention):
    """Mean over heads of KL(a' || a), where a are the attention probabilities of the student and a' the teacher's. Sun
    et al. 2020 (MobileBERT), arXiv:2004.02984, equation 2; with `layers=Last()` Wang et al. 2020 (MiniLM),
    arXiv:2002.10957, equation 6. Both models need the same number of heads."""

    label: ClassVar[str] = "attention_kl"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        ours, theirs = (x.attended(number) for x, number in zip((student, teacher), pair, strict=True))
        visible = Mask.of_rows(segments).dense(ours.rule)
        return _kl_of_rows(_scores(theirs, segments), _scores(ours, segments), visible)


@dataclass(frozen=True, kw_only=True)
class Relations(OfAttention):
    """The sum over x = queries, keys and values, each with its factor, of the mean over relation heads of KL(r' || r),
    where a row of r is softmax(x_i x_j^T / sqrt(d)) over the keys j that token i sees (without a window).

    With `heads`: the heads of attention are joined and split again into that many relation heads, each of width d, so
    that models may differ in heads and in width. Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, section 3.1. Without:
    each head of attention by itself; `Relations(queries=0.0, keys=0.0, layers=Last())` is the value relation of Wang et
    al. 2020 (MiniLM), arXiv:2002.10957, equation 8.

    Queries and keys are those that attention reads, after norm and rotary positions.
    """

    label: ClassVar[str] = "relation_kl"

    queries: float = 1.0
    keys: float = 1.0
    values: float = 1.0
    heads: int | None = None
    """Relation heads; divides the widths of queries, keys and values of both models. None: the heads of attention"""

    def __post_init__(self):
        positive(heads=self.heads)
        for name, factor in self.factors().items():
            if factor < 0:
                raise UserError(f"{name}: {factor} is negative; typical is 1, or 0 for none")
        if not any(self.factors().values()):
            raise UserError("queries, keys, values: all factors are 0; set one of them to 1")

    def factors(self) -> dict[str, float]:
        """Queries, keys and values, each with its factor."""
        return {"queries": self.queries, "keys": self.keys, "values": self.values}

    def compare(self, ours: Queries, theirs: Queries, pair: tuple[int, int]) -> None:
        for name, factor in self.factors().items():
            heads = [mixer.heads if name == "queries" else mixer.kv_heads for mixer in (ours, theirs)]
            if factor and self.heads is None:
                _equal(f"heads of {name}", heads[0], heads[1], pair, "set `heads` to a number of relation heads")
            for who, mixer, n in zip(("student", "teacher"), (ours, theirs), heads, strict=True):
                if factor and self.heads is not None and n * mixer.head_dim % self.heads:
                    raise UserError(
                        f"heads: {self.heads} relation heads do not divide the {n * mixer.head_dim} channels of the "
                        f"{who}'s {name}; choose a divisor of both models' widths"
                    )

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        ours, theirs = (x.attended(number) for x, number in zip((student, teacher), pair, strict=True))
        visible = Mask.of_rows(segments).dense(Scores(scale=1.0, causal=ours.rule.causal))
        total = jnp.zeros(segments.shape, ours.q.dtype)
        arrays = ((ours.q, theirs.q), (ours.k, theirs.k), (ours.v, theirs.v))
        for factor, (x, y) in zip(self.factors().values(), arrays, strict=True):
            if factor:
                total += factor * _kl_of_rows(self.products(y), self.products(x), visible)
        return total

    def products(self, x: jax.Array) -> jax.Array:
        """x [B, T, H, K] -> x_i x_j^T / sqrt(d) of each relation head, [B, A, T, T]."""
        x = x if self.heads is None else x.reshape(*x.shape[:2], self.heads, -1)
        return jnp.einsum("btad,bsad->bats", x, x) / math.sqrt(x.shape[-1])


def _equal(what: str, ours: int | None, theirs: int | None, pair: tuple[int, int], fix: str) -> None:
    if ours != theirs:
        raise UserError(
            f"layers: layer {pair[0]} of the student has {what} {ours}, and layer {pair[1]} of the teacher {theirs}; "
            f"{fix}"
        )


def _scores(x: Attended, segments: jax.Array) -> jax.Array:
    """[B, H, T, T]"""
    grouped = grouped_scores(x.q, x.k, Mask.of_rows(segments), x.rule)
    return grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])


def _kl_of_rows(teacher: jax.Array, student: jax.Array, visible: jax.Array) -> jax.Array:
    """Scores [B, H, T, T] of both -> the mean over heads of the divergence of each row's probabilities, [B, T]."""
    teacher, student = (
        jax.nn.log_softmax(jnp.where(visible[:, None], s, -jnp.inf), axis=-1) for s in (teacher, student)
    )
    return jnp.mean(kl(teacher, student), axis=1)
