"""Distillation from a teacher with another tokenizer in the spaces of both models: DSKD with cross-model attention.

Zhang et al. 2024, arXiv:2406.17328. Every token of the student looks for the tokens of the teacher that it corresponds
to, by attention over what both read and predict next. So the teacher's hidden states come to the student's positions,
where the student's output table makes them a distribution to learn from; and the student's come to the teacher's
positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.distill.across import Across, Taught, log_probs
from slmjax.distill.teacher import Teacher
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.divergences import Divergence, ForwardKL, kl
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import weighted_sums
from slmjax.models.assembly import Assembly
from slmjax.types import Batch, Key, Model, Objective
from slmjax.views import Carried, Matrix, without_objective


@dataclass(frozen=True, kw_only=True)
class DualSpace(Across):
    """cross_entropy * CE + match * (CE of the teacher in the student's space + T^2 * D there + T^2 * KL in the
    teacher's space), a token.

    With e the embeddings of a token and of the one after it, side by side, and h the last hidden states:

        A = e_student Q . e_teacher / sqrt(2 D), between tokens of one document
        into the student's space: softmax(A) (h_teacher + e_next of the teacher) V, through the student's output table,
            which this part does not train. Trained by cross-entropy; where its likeliest token is the target, the
            student learns it by D.
        into the teacher's space: softmax(A^T) (h_student P), through the teacher's output table; it learns the
            teacher's distribution by KL.

    Q, V and P are trained with the student and left behind. Embeddings and hidden states of the teacher are scaled to
    a standard deviation of 1, each vector by itself (the original: over the batch, which would make the loss depend on
    the micro-batches).

    Metrics: `loss` (the cross-entropy alone), and in training `mapped_loss` (the cross-entropy of the teacher in the
    student's space), `mapped_accuracy`, `divergence` and `teacher_space_kl`.
    """

    teacher_width: int
    """Channels of the teacher's embeddings and of its last hidden states (`slmjax inspect`)"""
    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 2.0
    """T, for teacher and student"""
    match: float = 0.5
    """Factor on what is learned from the teacher"""
    cross_entropy: float = 0.5
    """Factor on the cross-entropy with the targets of the data"""

    def __post_init__(self):
        self._check(self.match, self.cross_entropy)
        if not self.temperature > 0:
            raise UserError(f"objective.temperature: {self.temperature} is not above 0; typical is 1 to 4")

    def accepts(self, source: str, theirs: Assembly, model: Assembly, length: int) -> None:
        super().accepts(source, theirs, model, length)
        for name, assembly in (("objective.teacher", theirs), ("model", model)):
            if _width(assembly) != assembly.width:
                raise UserError(
                    f"{name}: embeddings of {_width(assembly)} and layers of {assembly.width} channels differ"
                )
        if theirs.width != self.teacher_width:
            raise UserError(
                f"objective.teacher_width is {self.teacher_width}, but {source} has {theirs.width} channels; set that"
            )

    def carried(self, model: Assembly) -> Carried:
        ours, theirs = model.width, self.teacher_width
        return Carried(
            matrices={
                "query": Matrix(shape=(2 * ours, 2 * theirs), axes=(None, None)),
                "value": Matrix(shape=(theirs, ours), axes=(None, "embed")),
                "back": Matrix(shape=(ours, theirs), axes=("embed", None)),
            }
        )

    def with_models(self, models: Sequence[Teacher], *, tokens: int) -> TaughtInBoth:
        return TaughtInBoth(spec=self, teacher=models[0], tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class TaughtInBoth(Taught):
    """`DualSpace` with its teacher in memory."""

    spec: DualSpace

    def carried(self, model: Assembly) -> Carried:
        return self.spec.carried(model)

    def build(self, model: Model) -> Objective:
        spec, teacher, squared = self.spec, self.teacher, self.spec.temperature**2

        def log_softmax(logits: jax.Array, tokens: int | None) -> jax.Array:
            return log_probs(logits / spec.temperature, tokens)

        def loss(params: Any, frozen: Any, batch: Batch, key: Key) -> tuple[Any, Mapping[str, Any]]:
            params, mine = without_objective(params)
            output = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
            fixed = jax.lax.stop_gradient(params)

            def per_token(logits: jax.Array, inputs: Any) -> Mapping[str, jax.Array]:
                values = cross_entropy(logits, inputs["targets"])
                found = {"loss": values["loss"], "accuracy": values["accuracy"]}
                if mine is None:
                    return found
                mapped = model.unembed(fixed, inputs["mapped"])
                of_mapped = cross_entropy(mapped, inputs["targets"])
                target = jax.lax.stop_gradient(log_softmax(mapped, self.tokens))
                distance = spec.divergence(target, log_softmax(logits, self.tokens))
                return found | {
                    "mapped_loss": jnp.where(inputs["found"], of_mapped["loss"], 0.0),
                    "mapped_accuracy": jnp.where(inputs["found"], of_mapped["accuracy"], 0.0),
                    "divergence": jnp.where(inputs["found"] & (of_mapped["accuracy"] > 0), distance, 0.0),
                }

            factors = {"loss": spec.cross_entropy}
            inputs: dict[str, Any] = {"targets": batch.targets}
            more, sums_there = 0.0, {}
            if mine is not None:
                factors |= {"mapped_loss": spec.match, "divergence": spec.match * squared}
                exchanged = self._exchanged(params, frozen, output.hidden, batch, mine["own"])
                inputs |= {"mapped": exchanged.to_student, "found": exchanged.found}

                def of_teacher(logits: jax.Array, hidden: jax.Array) -> Mapping[str, jax.Array]:
                    theirs = log_softmax(teacher.model.unembed(frozen, hidden), teacher.tokens)
                    return {"teacher_space_kl": kl(theirs, log_softmax(logits, teacher.tokens))}

                more, sums_there = weighted_sums(
                    of_teacher, teacher.model.unembed, frozen, exchanged.to_teacher, exchanged.hidden,
                    exchanged.weights, factors={"teacher_space_kl": spec.match * squared}, chunk=spec.chunk, arrays=6,
                )  # fmt: skip
            total, sums = weighted_sums(
                per_token, model.unembed, params, output.hidden, inputs, batch.weights,
                factors=factors, chunk=spec.chunk, arrays=8,
            )  # fmt: skip
            weight = sums["weight"]
            mean = 1.0 / jnp.where(weight == 0, 1.0, weight)
            both = {**{name: x for name, x in sums_there.items() if name != "weight"}, **sums}
            metrics = {**{name: x * mean for name, x in both.items()}, "weight": weight}
            return with_auxiliary((total + more) * mean, metrics, output.auxiliary, batch.weights)

        return Objective(loss=loss, frozen=teacher.params, axes=teacher.model.axes)

    def _exchanged(
        self, params: Any, frozen: Any, ours: jax.Array, batch: Batch, own: Mapping[str, jax.Array]
    ) -> Exchanged:
        """Hidden states [B, T, D] and [B, U, D'] taken to the other model's positions and space."""
        frozen = jax.lax.stop_gradient(frozen)
        tokens, segments = batch.extra["other_tokens"], batch.extra["other_segment_ids"]
        theirs = self.read(frozen, batch)
        following = jnp.roll(tokens, -1, axis=1)
        predicts = (segments > 0) & (segments == jnp.roll(segments, -1, axis=1))
        predicts = predicts & (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)
        of_student = jax.lax.stop_gradient(params["embed"]["table"])
        of_teacher = frozen["embed"]["table"]
        next_theirs = _scaled(of_teacher[following])
        index = jnp.concatenate([of_student[batch.tokens], of_student[batch.targets]], axis=-1)
        index_theirs = jnp.concatenate([_scaled(of_teacher[tokens]), next_theirs], axis=-1)
        scores = jnp.einsum("btd,de,bue->btu", index, own["query"], index_theirs) / jnp.sqrt(index_theirs.shape[-1])
        live = (batch.weights > 0)[:, :, None] & predicts[:, None, :]
        live = live & (batch.segment_ids[:, :, None] == segments[:, None, :])
        values = (_scaled(theirs) + next_theirs) @ own["value"]
        return Exchanged(
            to_student=_attention(scores, live) @ values,
            found=live.any(axis=2),
            to_teacher=_attention(scores.swapaxes(1, 2), live.swapaxes(1, 2)) @ (ours @ own["back"]),
            hidden=theirs,
            weights=live.any(axis=1).astype(jnp.float32),
        )


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What each model gets from the other."""

    to_student: jax.Array  # [B, T, D]: of the teacher, in the student's space
    found: jax.Array  # bool [B, T]: whether a token of the teacher corresponds
    to_teacher: jax.Array  # [B, U, D']: of the student, in the teacher's space
    hidden: jax.Array  # [B, U, D']: of the teacher itself
    weights: jax.Array  # float32 [B, U]: 1 where a token of the student corresponds


def _attention(scores: jax.Array, live: jax.Array) -> jax.Array:
    """Softmax over the last axis where `live`; all 0 where nothing is."""
    scores = jnp.where(live, scores, -1e30)
    return jnp.where(live, jax.nn.softmax(scores, axis=-1), 0.0)


def _scaled(x: jax.Array) -> jax.Array:
    """Each vector [..., D] divided by the standard deviation of its channels."""
    return x / jnp.maximum(jnp.std(x, axis=-1, keepdims=True), 1e-6)


def _width(assembly: Assembly) -> int:
    """Channels of the embeddings."""
    return getattr(assembly, "table_width", None) or assembly.width
