"""Terms that compare what student and teacher compute inside: a loss, its weight over the steps, and their sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.distill.features import Feature, Seen, document_sums, sizes, together
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.types import Batch
from slmjax.views import Carried, Matrix


@dataclass(frozen=True, kw_only=True)
class Weight(ABC):
    """A factor on a loss that depends on the step."""

    @abstractmethod
    def __call__(self, step: jax.Array, pairs: int) -> jax.Array:
        """The factor of each pair of layers, in the order of the layer map.

        Args:
            step: int32 [], updates made so far; skipped ones do not count.
            pairs: their number.

        Returns:
            float32 [pairs]
        """


@dataclass(frozen=True, kw_only=True)
class Ramp(Weight):
    """From `start` to `end` in a straight line over the first `steps` updates, then `end`."""

    start: float = 0.0
    end: float = 1.0
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"weight.steps: {self.steps} is not a positive number of steps")

    def __call__(self, step: jax.Array, pairs: int) -> jax.Array:
        share = jnp.minimum(step.astype(jnp.float32) / self.steps, 1.0)
        return jnp.full(pairs, self.start + (self.end - self.start) * share)


@dataclass(frozen=True, kw_only=True)
class Progressive(Weight):
    """One pair of layers after another, from the first of the layer map on, each for `each` updates. Sun et al. 2020
    (MobileBERT), arXiv:2004.02984, section 3.3, "progressive knowledge transfer".

    Where the paper freezes lower layers (or trains them with a smaller learning rate), their own losses stay on with
    the factor `kept`. After the last pair, all have the factor `after`."""

    each: int
    weight: float = 1.0
    """Factor of the pair whose turn it is"""
    kept: float = 1.0
    """Factor of the pairs before it"""
    after: float = 0.0

    def __post_init__(self):
        if self.each < 1:
            raise UserError(f"weight.each: {self.each} is not a positive number of steps")

    def __call__(self, step: jax.Array, pairs: int) -> jax.Array:
        turn, number = step // self.each, jnp.arange(pairs)
        factors = jnp.where(number < turn, self.kept, jnp.where(number == turn, self.weight, 0.0))
        return jnp.where(turn < pairs, factors, self.after).astype(jnp.float32)


def factor(weight: float | Weight, step: jax.Array) -> Any:
    """The factor on a loss that is not one of pairs of layers, at this step."""
    return weight(step, 1)[0] if isinstance(weight, Weight) else weight


@dataclass(frozen=True, kw_only=True)
class Term:
    """weight * loss, summed over pairs of layers."""

    loss: Feature
    weight: float | Weight = 1.0
    """A number, or its schedule: `Ramp`, `Progressive`"""
    teacher: int = 0
    """Index in `Distill.teachers` of the teacher that is compared with"""
    everywhere: bool = True
    """True: every token of a document counts, as in the papers: each of its tokens has the mean of the loss over the
    document. False: only tokens that are predicted, by their weights. Documents without any do not count either way"""


def check(terms: Sequence[Term], teachers: Sequence[str]) -> None:
    """
    Raises:
        UserError: a term names a teacher that does not exist, or has a negative weight.
    """
    for i, term in enumerate(terms):
        if not 0 <= term.teacher < len(teachers):
            raise UserError(
                f"objective.terms.{i}.teacher: {term.teacher} is not the index of one of the {len(teachers)} teachers; "
                "the first is 0"
            )
        if not isinstance(term.weight, Weight) and not term.weight >= 0:
            raise UserError(f"objective.terms.{i}.weight: {term.weight} is negative; typical is 1")


def check_models(terms: Sequence[Term], teacher: int, theirs: Assembly, student: Assembly) -> None:
    """
    Args:
        teacher: index of the teacher; terms of the others are not looked at.

    Raises:
        UserError: the two models cannot be compared as a term says.
    """
    for i, term in enumerate(terms):
        if term.teacher == teacher:
            try:
                term.loss.check(student, theirs)
            except UserError as error:
                raise UserError(f"objective.terms.{i}.loss.{error}") from None


def carried(terms: Sequence[Term], student: Assembly) -> Carried | None:
    """What the terms keep from step to step: projections, and the number of updates where a weight depends on it."""
    matrices: dict[str, Matrix] = {
        f"{i}/{name}": matrix for i, term in enumerate(terms) for name, matrix in term.loss.matrices(student).items()
    }
    if not matrices and not any(isinstance(term.weight, Weight) for term in terms):
        return None
    return Carried(matrices=matrices)


def collects(terms: Sequence[Term], teacher: int | None, student: int, theirs: Sequence[int]) -> bool:
    """Whether terms of this teacher (None: of any) read more than the last hidden vectors.

    Args:
        student: layers of the student.
        theirs: layers of each teacher.
    """
    return any(term.loss.collects(student, theirs[term.teacher]) for term in terms if teacher in (None, term.teacher))


def names(terms: Sequence[Term]) -> list[str]:
    """The name of each term's metric: the loss's; of equal ones, the second has _2, and so on."""
    labels = [term.loss.label for term in terms]
    counts = [labels[: i + 1].count(label) for i, label in enumerate(labels)]
    return [label if n == 1 else f"{label}_{n}" for label, n in zip(labels, counts, strict=True)]


def measured(
    terms: Sequence[Term], student: Seen, teachers: Sequence[Seen], batch: Batch, mine: Mapping[str, Any] | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """All terms as means over tokens weighted by `batch.weights`.

    Args:
        teachers: each only if a term compares with it.
        mine: what `Carried` adds to the parameters of a training step; None in evaluation. Terms with trained arrays
            are left out then, and weights are those of step 0.

    Returns:
        The sum [] with its factors, and {metric: the loss [] without its factor, summed over pairs of layers}.
    """
    same = together(batch.segment_ids)
    n, weights = sizes(same), batch.weights
    weight = jnp.sum(weights)
    share = weights / jnp.where(weight == 0, 1.0, weight)
    step = jnp.int32(0) if mine is None else mine["step"]
    own = {} if mine is None else mine["own"]
    total, metrics = jnp.zeros((), weights.dtype), {}
    for i, (name, term) in enumerate(zip(names(terms), terms, strict=True)):
        teacher = teachers[term.teacher]
        pairs = term.loss.layers.pairs(len(student.rules), len(teacher.rules))
        if mine is None and term.loss.trains:
            continue
        factors = term.weight(step, len(pairs)) if isinstance(term.weight, Weight) else [term.weight] * len(pairs)
        found = []
        for pair in pairs:
            values = term.loss(student, teacher, pair, batch.segment_ids, own.get(str(i), {}))
            values = jnp.where(batch.segment_ids > 0, values, 0.0)
            values = document_sums(values, same) / n if term.everywhere else values
            found.append(jnp.sum(jnp.where(share != 0, values, 0.0) * share))
        total += sum(factor * value for factor, value in zip(factors, found, strict=True))
        metrics[name] = jax.lax.stop_gradient(sum(found[1:], found[0]))
    return total, metrics
