"""Distillation: a student learns the predictions of one or more frozen teachers.

Hinton et al. 2015, arXiv:1503.02531; the divergences are those of `losses/divergences.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.data.spec import Data
from slmjax.distill import terms
from slmjax.distill.features import Seen
from slmjax.distill.sequences import FromData, Sequences, begin_step
from slmjax.distill.source import Online, Source
from slmjax.distill.teacher import Teacher, check, combined, rounded
from slmjax.distill.terms import Term, Weight
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.divergences import Divergence, ForwardKL
from slmjax.losses.logits import at, exponentials, largest, likeliest
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import weighted_means
from slmjax.models.assembly import Assembly
from slmjax.objectives import MaskedLM, NextToken, ObjectiveSpec
from slmjax.serialise import to_json
from slmjax.types import Batch, Key, Model, Objective, Special
from slmjax.views import Carried


@dataclass(frozen=True, kw_only=True)
class Distill(ObjectiveSpec):
    """cross_entropy * CE + match * T^2 * D, nats a token, where D is the divergence of the student's distribution from
    the teachers', both at temperature T; T^2 keeps the gradient's size as T changes (Hinton et al. 2015, section 2).

    Several teachers are averaged: their probabilities, not their logits. Vocabularies are aligned by the tokenizer and
    not by the number of logits. The teachers' logits exist for one piece of the tokens at a time, like the student's.

    `terms` compare what both compute inside; with `match=0` they are all that is learned from the teachers.

    With `sequences=OnPolicy()` some rows are continued by the student itself. D, the terms and every metric are then
    means over the tokens of the data and the sampled ones together; the cross-entropy is minimised for tokens of the
    data alone (and divided by the number of all).

    Metrics: `loss` (the cross-entropy alone, comparable with any other run), `divergence` (D), `teacher_loss` (the
    cross-entropy of the teachers at T) and `agreement` (the share of tokens where both find the same one likeliest),
    these three only with `match` above 0; one for each term; and in training with `OnPolicy` the share of tokens that
    are `sampled`, which `loss` counts too: compare the loss of the evaluation instead.
    """

    teachers: tuple[str, ...]
    """Each a run folder, a checkpoint, a Hugging Face folder or a GGUF file. Other parameters make another experiment;
    another path to the same parameters does not"""
    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 2.0
    """T, for teachers and student"""
    match: float | Weight = 0.5
    """Factor on T^2 * D: a number, or its schedule (`terms.Ramp`)"""
    cross_entropy: float | Weight = 0.5
    """Factor on the cross-entropy with the targets of the data, likewise"""
    teacher_bits: int | None = None
    """Bits of the teachers' weights in memory, 2 to 8, to save memory: the matrices of their layers are rounded to
    nearest (8 change little) and kept as codes, a copy on each device. None: float32, split over devices"""
    source: Source = field(default_factory=Online)
    """Where the teachers' last hidden states come from: the teachers, which run in every step, or a disk (`OnDisk`)"""
    sequences: Sequences = field(default_factory=FromData)
    """What is read: `FromData`, or in part what the student writes itself (`OnPolicy`)"""
    task: ObjectiveSpec = field(default_factory=NextToken)
    """Which positions are predicted, and the targets there: NextToken, MaskedLM or Classify"""
    terms: tuple[Term, ...] = ()
    """Losses between what both compute inside, added to the above (terms.py); each is a metric"""
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""

    def __post_init__(self):
        if not self.teachers:
            raise UserError("objective.teachers is empty; name at least one trained model")
        if not self.temperature > 0:
            raise UserError(f"objective.temperature: {self.temperature} is not above 0; typical is 1 to 4")
        if not isinstance(self.match, Weight) and (self.match < 0 or not (self.match or self.terms)):
            raise UserError(
                f"objective.match: {self.match} is not above 0, so the teachers would not matter; typical is 0.5, or 0 "
                "where objective.terms are all that is learned from them"
            )
        if self.teacher_bits is not None and not 2 <= self.teacher_bits <= 8:
            raise UserError(f"objective.teacher_bits: {self.teacher_bits} is not in 2 to 8; typical is 8")
        if not isinstance(self.cross_entropy, Weight) and self.cross_entropy < 0:
            raise UserError(f"objective.cross_entropy: {self.cross_entropy} is negative; typical is 0.5, or 0 for none")
        if isinstance(self.task, NextToken | MaskedLM) and (self.task.z_loss or self.task.chunk):
            raise UserError(
                "objective.task: z_loss and chunk are not used in distillation; set objective.chunk instead"
            )
        if self.sequences.samples and not isinstance(self.task, NextToken):
            raise UserError(
                f"objective.sequences is {type(self.sequences).__name__}, which continues texts token by token, but "
                f"objective.task is {type(self.task).__name__}: set objective.sequences=FromData()"
            )
        if self.sequences.samples and not self.source.inside:
            raise UserError(
                f"objective.sequences is {type(self.sequences).__name__}, but {type(self.source).__name__} knows "
                "nothing of new texts: set objective.source=Online()"
            )
        terms.check(self.terms, self.teachers)
        if self.terms and not self.source.inside:
            raise UserError(
                f"objective.terms compare what both compute inside, which {type(self.source).__name__} does not have; "
                "set objective.source=Online()"
            )

    def fits(self, model: Assembly) -> None:
        self.task.fits(model)

    def reads(self, model: Assembly, data: Data) -> None:
        self.task.reads(model, data)
        self.source.reads(data, self.teachers)
        self.sequences.reads(data)

    def ready(self, data: Data, models: Mapping[str, str]) -> None:
        self.source.ready(data, models)

    @property
    def predicted(self) -> float:
        return self.task.predicted

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.task.unit

    def with_special(self, special: Special) -> Distill:
        return replace(self, task=self.task.with_special(special), sequences=self.sequences.with_special(special))

    def identity(self, models: Mapping[str, str]) -> Any:
        return {**to_json(self), "teachers": [models[path] for path in self.teachers]}

    def models(self) -> tuple[str, ...]:
        return self.teachers

    @property
    def output_tables(self) -> bool:
        return self.source.output_tables

    def build(self, model: Model) -> Objective:
        raise UserError("a Distill objective cannot be built without its teachers: give it them by with_models")

    def accepts(self, source: str, theirs: Assembly, model: Assembly, length: int) -> None:
        check(source, theirs, model, length)
        for i, teacher in enumerate(self.teachers):
            if teacher == source:
                terms.check_models(self.terms, i, theirs, model)

    def carried(self, model: Assembly) -> Carried | None:
        scheduled = any(isinstance(x, Weight) for x in (self.match, self.cross_entropy))
        # What a step carries also tells it from an evaluation, for which nothing is sampled.
        bare = Carried(matrices={}) if scheduled or self.sequences.samples else None
        return terms.carried(self.terms, model) or bare

    def with_models(self, models: Sequence[Teacher], *, tokens: int) -> Taught:
        teachers = tuple(map(self.source.reduced, models))
        if self.teacher_bits is not None:
            teachers = tuple(rounded(teacher, self.teacher_bits) for teacher in teachers)
        return Taught(spec=self, teachers=teachers, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Taught(ObjectiveSpec):
    """`Distill` with its teachers in memory. Not part of an experiment: it is made when a run begins."""

    spec: Distill
    teachers: tuple[Teacher, ...]
    tokens: int
    """Ids of the tokenizer, from 0"""

    @property
    def predicted(self) -> float:
        return self.spec.predicted

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.spec.unit

    def more_flops(self, model: Assembly, length: int) -> float:
        """Those of the teachers' forward passes, and of sampling."""
        theirs = [teacher.assembly for teacher in self.teachers]
        passes = sum(self.spec.source.flops(each, length, self.predicted) for each in theirs)
        return passes + self.spec.sequences.flops(model, theirs, length)

    def carried(self, model: Assembly) -> Carried | None:
        return self.spec.carried(model)

    def build(self, model: Model) -> Objective:
        spec, task = self.spec, self.spec.task
        tokens = None if self.teachers[0].assembly.labels else self.tokens
        read = {str(i): teacher.model for i, teacher in enumerate(self.teachers)}
        layers = [len(teacher.model.rules) for teacher in self.teachers]
        collects = {
            who: terms.collects(spec.terms, who, len(model.rules), layers) for who in (None, *range(len(layers)))
        }

        prepared = task.build(model).prepare

        def loss(params: Any, frozen: Any, batch: Batch, key: Key) -> tuple[Any, Mapping[str, Any]]:
            params, mine, frozen, batch, sampled, samples = begin_step(
                spec.sequences, model, read, params, frozen, batch, tokens=self.tokens
            )
            where = task.scored(model, batch)
            updates = jnp.int32(0) if mine is None else mine["step"]
            factors = {"of_data": terms.factor(spec.cross_entropy, updates)}
            if spec.match:
                factors["divergence"] = terms.factor(spec.match, updates) * spec.temperature**2

            def per_token(logits: jax.Array, inputs: Any) -> Mapping[str, jax.Array]:
                values = cross_entropy(logits, inputs["targets"])
                found = {"loss": values["loss"], "accuracy": values["accuracy"]}
                found["of_data"] = jnp.where(inputs["sampled"], 0.0, values["loss"])
                if samples:
                    found["sampled"] = inputs["sampled"].astype(jnp.float32)
                if not spec.match:
                    return found
                # The barrier keeps XLA's CPU back end from computing the product and what follows in one slow loop.
                theirs = [
                    jax.lax.optimization_barrier(teacher.unembed(frozen[name], inputs["hidden"][name]))
                    for name, teacher in read.items()
                ]
                target = combined(theirs, temperature=spec.temperature, outputs=logits.shape[-1], tokens=tokens)
                top, best = largest(target), likeliest(logits)
                divergence = spec.divergence.of_logits(
                    target, logits / spec.temperature, (top, largest(logits) / spec.temperature)
                )
                return found | {
                    "divergence": divergence,
                    "teacher_loss": exponentials(target, top)[2] - at(target, inputs["targets"]),
                    "agreement": at(target, best) >= top,
                }

            read_here = (batch.tokens, batch.positions, batch.segment_ids)
            output = model.apply(params, *read_here, collect=collects[None])
            taught = {
                str(i): spec.source.output(teacher, frozen[str(i)], batch, collect=collects[i])
                for i, teacher in enumerate(self.teachers)
            }
            hidden = {name: where.of(x.hidden) for name, x in taught.items()} if spec.match else {}
            inputs = {"targets": where.targets, "hidden": hidden, "sampled": where.of(sampled[..., None])[..., 0]}
            total, metrics = weighted_means(
                per_token, model.unembed, params, where.of(output.hidden), inputs, where.weights,
                factors=factors, chunk=spec.chunk, arrays=1 + len(read),
            )  # fmt: skip
            metrics = {name: x for name, x in metrics.items() if name != "of_data"}
            if spec.terms:
                theirs = [Seen(taught[name], teacher.rules) for name, teacher in read.items()]
                more, compared = terms.measured(spec.terms, Seen(output, model.rules), theirs, batch, mine)
                total, metrics = total + more, {**metrics, **compared}
            return with_auxiliary(total, metrics, output.auxiliary, batch.weights)

        return Objective(
            loss=loss,
            frozen={name: teacher.params for name, teacher in zip(read, self.teachers, strict=True)},
            axes=None if spec.teacher_bits else {name: teacher.axes for name, teacher in read.items()},
            prepare=lambda batch, key: spec.sequences.prepare(prepared(batch, key), key),
        )
