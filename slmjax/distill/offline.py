"""Distillation from sparse targets on disk: the teacher is not needed while the student trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.data.spec import Data
from slmjax.distill.source import targets_of
from slmjax.distill.stored import listed, normalised
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.divergences import Divergence, ForwardKL
from slmjax.losses.logits import likeliest
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import weighted_means
from slmjax.models.assembly import Assembly
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.types import Batch, Key, Model, Objective


@dataclass(frozen=True, kw_only=True)
class DistillOffline(ObjectiveSpec):
    """cross_entropy * CE + match * D, nats a token, where D is the divergence of the student's distribution from the
    stored one, over the stored events, at temperature 1. For decoders.

    The events are those that `data.extra` (TeacherTargets) reads from a folder of `slmjax data teacher`: tokens and,
    for targets of the kind tail, one more event for all other tokens together. What the student learns from each kind
    is said in `distill.stored`. Hidden states are read by `Distill` with the source `OnDisk`.

    Metrics: `loss` (the cross-entropy alone, comparable with any other run), `divergence` (D), `accuracy`, and
    `agreement` (the share of tokens where the student's likeliest token is the stored one).
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    """Its value is that of whole distributions only where the events are all tokens"""
    renormalise: bool = True
    """Whether the stored probabilities are scaled to sum to 1. Without it, those of top-k are truncated: their D is no
    divergence, and may be negative. With both, what top-k leaves out is learnt to never follow"""
    match: float = 0.5
    """Factor on D"""
    cross_entropy: float = 0.5
    """Factor on the cross-entropy with the targets of the data"""
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""

    def __post_init__(self):
        if not self.match > 0:
            raise UserError(
                f"objective.match: {self.match} is not above 0, so the teacher would not matter; typical is 0.5"
            )
        if self.cross_entropy < 0:
            raise UserError(f"objective.cross_entropy: {self.cross_entropy} is negative; typical is 0.5, or 0 for none")

    def fits(self, model: Assembly) -> None:
        if not model.causal or not model.predicts_tokens:
            raise UserError("objective is DistillOffline, which is for decoders that predict tokens; use Distill()")

    def reads(self, model: Assembly, data: Data) -> None:
        NextToken().reads(model, data)
        targets_of(data, "objective is DistillOffline")

    def ready(self, data: Data, models: Mapping[str, str]) -> None:
        for folder, targets in targets_of(data, "objective is DistillOffline").by_folder.items():
            if "hidden" in targets.columns:
                raise UserError(
                    f"objective is DistillOffline, but {folder} holds hidden states; use Distill(teachers=("
                    f"'{folder}/head',), source=OnDisk())"
                )

    def build(self, model: Model) -> Objective:
        factors = {"loss": self.cross_entropy, "divergence": self.match}

        def per_token(logits: jax.Array, inputs: Any) -> Mapping[str, jax.Array]:
            values, events = cross_entropy(logits, inputs["targets"]), inputs["log_probs"]
            theirs = normalised(events) if self.renormalise else events
            first = jnp.take_along_axis(inputs["ids"], jnp.argmax(events, axis=-1, keepdims=True), axis=-1)[..., 0]
            return {
                "loss": values["loss"],
                "divergence": self.divergence(theirs, listed(inputs["ids"], jax.nn.log_softmax(logits))),
                "accuracy": values["accuracy"],
                "agreement": first == likeliest(logits),
            }

        def loss(params: Any, frozen: Any, batch: Batch, key: Key) -> tuple[Any, Mapping[str, Any]]:
            output = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
            inputs = {"targets": batch.targets, "ids": batch.extra["ids"], "log_probs": batch.extra["log_probs"]}
            found = weighted_means(
                per_token, model.unembed, params, output.hidden, inputs, batch.weights, factors=factors,
                chunk=self.chunk,
            )  # fmt: skip
            return with_auxiliary(*found, output.auxiliary, batch.weights)

        return Objective(loss=loss)
