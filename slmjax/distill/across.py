"""Distillation from a teacher with another tokenizer: Universal Logit Distillation (ULD).

Boizard et al. 2024, arXiv:2402.12030. Ids mean nothing across tokenizers, so what is compared is how probability is
spread: the sorted probabilities of both. Their distance is the Wasserstein distance of the two distributions where
every move costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.data.retokenized import Retokenized
from slmjax.data.spec import Data
from slmjax.distill.teacher import Teacher, check
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import weighted_means
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.serialise import to_json
from slmjax.types import Batch, Key, Model, Objective, Params


def sorted_distance(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """sum over i of |i-th largest probability of the teacher - i-th largest of the student|.

    The shorter distribution is filled with zeros.

    Args:
        teacher, student: log-probabilities [..., V] and [..., W].

    Returns:
        [...], from 0 to 2.
    """
    most = max(teacher.shape[-1], student.shape[-1])
    sorted_ = [
        jnp.pad(jnp.sort(jnp.exp(x), axis=-1, descending=True), [(0, 0)] * (x.ndim - 1) + [(0, most - x.shape[-1])])
        for x in (teacher, student)
    ]
    return jnp.sum(jnp.abs(sorted_[0] - sorted_[1]), axis=-1)


@dataclass(frozen=True, kw_only=True)
class Across(ObjectiveSpec):
    """A decoder learns from a teacher with another tokenizer, which reads the same text in its own tokens
    (`data.extra=Retokenized(...)`)."""

    teacher: str
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file, with its tokenizer"""
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""
    same_tokens = False

    def _check(self, match: float, cross_entropy: float) -> None:
        """Checks the factors of the two parts of the loss.

        Raises:
            UserError: one is out of range.
        """
        if not match > 0:
            raise UserError(f"objective.match: {match} is not above 0, so the teacher would not matter; typical is 0.5")
        if cross_entropy < 0:
            raise UserError(f"objective.cross_entropy: {cross_entropy} is negative; typical is 0.5, or 0 for none")

    def fits(self, model: Assembly) -> None:
        if not model.causal or not model.predicts_tokens:
            raise UserError(
                f"objective is {type(self).__name__}, which is for decoders that predict tokens; use Distill()"
            )

    def reads(self, model: Assembly, data: Data) -> None:
        NextToken().reads(model, data)
        if not isinstance(getattr(data, "extra", None), Retokenized):
            raise UserError(
                f"objective is {type(self).__name__}, whose teacher reads the text in its own tokens; set data.extra="
                f"Retokenized(data=STORE, other='{self.teacher}', length=...)"
            )

    def identity(self, models: Mapping[str, str]) -> Any:
        return {**to_json(self), "teacher": models[self.teacher]}

    def models(self) -> tuple[str, ...]:
        return (self.teacher,)

    def build(self, model: Model) -> Objective:
        raise UserError(
            f"a {type(self).__name__} objective cannot be built without its teacher: give it by with_models"
        )

    def accepts(self, source: str, theirs: Assembly, model: Assembly, length: int) -> None:
        check(source, theirs, model, length)


@dataclass(frozen=True, kw_only=True)
class Taught(ObjectiveSpec):
    """An `Across` objective with its teacher in memory. Not part of an experiment: it is made when a run begins."""

    teacher: Teacher
    tokens: int
    """Ids of the data's tokenizer, from 0"""

    def more_flops(self, model: Assembly, length: int) -> float:
        """Those of the teacher's forward pass, a third of a training step, as if both had equally many tokens."""
        return flops_per_token(self.teacher.assembly, length).attention / 3

    def read(self, frozen: Params, batch: Batch) -> jax.Array:
        """The teacher's last hidden states [B, U, D] of the text in its own tokens."""
        read = (batch.extra[f"other_{name}"] for name in ("tokens", "positions", "segment_ids"))
        return self.teacher.model.apply(frozen, *read).hidden


@dataclass(frozen=True, kw_only=True)
class DistillAcross(Across):
    """cross_entropy * CE + match * ULD, a token.

    The two are compared after every token of the student that ends at the byte where one of the teacher's ends; other
    tokens add 0, and the mean is over all tokens. (The paper compares the n-th token of one with the n-th of the other,
    which drifts apart in long texts.)

    Metrics: `loss` (the cross-entropy alone), `uld`, and `aligned` (the share of tokens that are compared).
    """

    match: float = 1.5
    """Factor on ULD; 1.5 in the paper"""
    cross_entropy: float = 1.0
    """Factor on the cross-entropy with the targets of the data"""

    def __post_init__(self):
        self._check(self.match, self.cross_entropy)

    def with_models(self, models: Sequence[Teacher], *, tokens: int) -> TaughtAcross:
        return TaughtAcross(spec=self, teacher=models[0], tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class TaughtAcross(Taught):
    """`DistillAcross` with its teacher in memory."""

    spec: DistillAcross

    def build(self, model: Model) -> Objective:
        spec, teacher = self.spec, self.teacher
        factors = {"loss": spec.cross_entropy, "uld": spec.match}

        def loss(params: Any, frozen: Any, batch: Batch, key: Key) -> tuple[Any, Mapping[str, Any]]:
            frozen = jax.lax.stop_gradient(frozen)
            at = batch.extra["other_at"]
            theirs = jnp.take_along_axis(self.read(frozen, batch), jnp.maximum(at, 0)[..., None], axis=1)

            def per_token(logits: jax.Array, inputs: Any) -> Mapping[str, jax.Array]:
                values = cross_entropy(logits, inputs["targets"])
                of_teacher = log_probs(teacher.model.unembed(frozen, inputs["hidden"]), teacher.tokens)
                distance = sorted_distance(of_teacher, log_probs(logits, self.tokens))
                return {
                    "loss": values["loss"],
                    "uld": jnp.where(inputs["aligned"], distance, 0.0),
                    "accuracy": values["accuracy"],
                    "aligned": inputs["aligned"].astype(jnp.float32),
                }

            output = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
            inputs = {"targets": batch.targets, "hidden": theirs, "aligned": at >= 0}
            total, metrics = weighted_means(
                per_token, model.unembed, params, output.hidden, inputs, batch.weights,
                factors=factors, chunk=spec.chunk, arrays=8,
            )  # fmt: skip
            return with_auxiliary(total, metrics, output.auxiliary, batch.weights)

        return Objective(loss=loss, frozen=teacher.params, axes=teacher.model.axes)


def log_probs(logits: jax.Array, tokens: int | None) -> jax.Array:
    """Log-probabilities of the ids that stand for tokens."""
    return jax.nn.log_softmax(logits[..., :tokens])
