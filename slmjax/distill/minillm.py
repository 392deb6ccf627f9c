"""MiniLLM: a student learns to write what its teacher finds likely, by policy gradient over its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.data.spec import Data
from slmjax.distill.policy_gradient import importance, rewards_to_come, surrogate, token_rewards
from slmjax.distill.sequences import OnPolicy, begin_step
from slmjax.distill.teacher import Teacher, average, check
from slmjax.errors import UserError, positive
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.divergences import ReverseKL
from slmjax.losses.logits import at, likeliest
from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import token_values
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.serialise import to_json
from slmjax.types import Batch, Key, Model, Objective, Special
from slmjax.views import Carried


@dataclass(frozen=True, kw_only=True)
class MiniLLM(ObjectiveSpec):
    """KL(q || p) over sampled sequences, by the policy gradient of `policy_gradient.py`, plus `language_model` times
    the cross-entropy of the rows that are not sampled; both are sums over tokens, divided by the number of all tokens
    that have a target. q is the student, p the mean of the teachers. Gu et al. 2023, arXiv:2306.08543.

    Each sample is used for one update, by the student that drew it. So the clipped ratio of the paper's algorithm,
    which guards several updates on the same samples, is 1 and is left out.

    The paper begins with a student that has been fine-tuned (`start.FromModel`): samples of an untrained one teach
    little.

    Metrics, means over the sampled tokens and those of the data together: `loss` (cross-entropy of the targets),
    `divergence` (KL(q || p) over the next token), `agreement`, `accuracy`; in training also `sampled`, the share of
    tokens that are sampled, and `reward`, the sampled tokens' sum of log p - log q, divided by the number of all.
    """

    teachers: tuple[str, ...]
    """As in `Distill`"""
    sequences: OnPolicy = field(default_factory=lambda: OnPolicy(teacher_share=0.2))
    """How rows are sampled; at temperature 1"""
    normalise: bool = True
    """Whether the sum of the rewards after a token is divided by their number"""
    clip: float = 100.0
    """Largest reward of a token, and smallest with a minus. The authors' code has 100"""
    language_model: float = 1.0
    """Factor on the cross-entropy with the targets of the data"""
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""

    def __post_init__(self):
        if not self.teachers:
            raise UserError("objective.teachers is empty; name at least one trained model")
        if self.sequences.temperature != 1:
            raise UserError(
                f"objective.sequences.temperature: {self.sequences.temperature}, but the policy gradient is that of "
                "samples at temperature 1"
            )
        if not self.sequences.fraction > 0:
            raise UserError(
                "objective.sequences.fraction: 0, so nothing would be learned from the teachers; typical is 0.5"
            )
        positive(**{"objective.clip": self.clip})
        if self.language_model < 0:
            raise UserError(f"objective.language_model: {self.language_model} is negative; typical is 1, or 0 for none")

    def fits(self, model: Assembly) -> None:
        if not model.causal or not model.predicts_tokens:
            raise UserError("objective is MiniLLM, which is for decoders that predict tokens; use Distill()")

    def reads(self, model: Assembly, data: Data) -> None:
        NextToken().reads(model, data)
        self.sequences.reads(data)

    def with_special(self, special: Special) -> MiniLLM:
        return replace(self, sequences=self.sequences.with_special(special))

    def identity(self, models: Mapping[str, str]) -> Any:
        return {**to_json(self), "teachers": [models[path] for path in self.teachers]}

    def models(self) -> tuple[str, ...]:
        return self.teachers

    def build(self, model: Model) -> Objective:
        raise UserError("a MiniLLM objective cannot be built without its teachers: give it them by with_models")

    def accepts(self, source: str, theirs: Assembly, model: Assembly, length: int) -> None:
        check(source, theirs, model, length)

    def carried(self, model: Assembly) -> Carried | None:
        return Carried(matrices={})  # it tells a step from an evaluation, which reads the data

    def with_models(self, models: Sequence[Teacher], *, tokens: int) -> Rewarded:
        return Rewarded(spec=self, teachers=tuple(models), tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Rewarded(ObjectiveSpec):
    """`MiniLLM` with its teachers in memory. Not part of an experiment: it is made when a run begins."""

    spec: MiniLLM
    teachers: tuple[Teacher, ...]
    tokens: int
    """Ids of the tokenizer, from 0"""

    def more_flops(self, model: Assembly, length: int) -> float:
        """Those of the teachers' forward passes, of sampling, and of the logits, which are computed twice."""
        theirs = [teacher.assembly for teacher in self.teachers]
        passes = sum(flops_per_token(each, length).attention / 3 for each in theirs)
        again = sum(2.0 * each.logit_products() for each in (model, *theirs))
        return passes + again + self.spec.sequences.flops(model, theirs, length)

    def carried(self, model: Assembly) -> Carried | None:
        return self.spec.carried(model)

    def build(self, model: Model) -> Objective:
        spec = self.spec
        read = {str(i): teacher.model for i, teacher in enumerate(self.teachers)}

        def loss(params: Any, frozen: Any, batch: Batch, key: Key) -> tuple[Any, Mapping[str, Any]]:
            params, _, frozen, batch, sampled, samples = begin_step(
                spec.sequences, model, read, params, frozen, batch, tokens=self.tokens
            )

            def per_token(logits: jax.Array, inputs: Any) -> Mapping[str, jax.Array]:
                theirs = [each.unembed(frozen[name], inputs["hidden"][name]) for name, each in read.items()]
                p = average(theirs, temperature=1.0, outputs=logits.shape[-1], tokens=self.tokens)
                values = cross_entropy(logits, inputs["targets"])
                return {
                    "loss": values["loss"],
                    "divergence": ReverseKL()(p, jax.nn.log_softmax(logits)),
                    "log_p": at(p, inputs["targets"]),
                    "accuracy": values["accuracy"].astype(logits.dtype),
                    "agreement": (likeliest(p) == likeliest(logits)).astype(logits.dtype),
                }

            read_here = (batch.tokens, batch.positions, batch.segment_ids)
            output = model.apply(params, *read_here)
            hidden = {name: each.apply(frozen[name], *read_here).hidden for name, each in read.items()}
            inputs = {"targets": batch.targets, "hidden": hidden}
            values = dict(
                token_values(
                    per_token, model.unembed, params, output.hidden, inputs, batch.weights,
                    chunk=spec.chunk, arrays=4 * (1 + len(read)),
                )
            )  # fmt: skip
            log_p, log_q = jax.lax.stop_gradient(values.pop("log_p")), -values["loss"]
            rewards = token_rewards(log_p, log_q, spec.clip)
            to_come = rewards_to_come(rewards, sampled, normalise=spec.normalise)
            weights = importance(log_p, log_q, spec.sequences.teacher_share)
            learned = jnp.where(
                sampled,
                surrogate(values["divergence"], log_q, to_come, weights),
                spec.language_model * values["loss"],
            )
            if samples:
                values["sampled"] = sampled.astype(log_q.dtype)
                values["reward"] = jnp.where(sampled, rewards, 0.0)
            weight = jnp.sum(batch.weights)
            share = batch.weights / jnp.where(weight == 0, 1.0, weight)
            metrics = {name: jnp.sum(jax.lax.stop_gradient(x) * share) for name, x in values.items()}
            total = jnp.sum(learned * share)
            return with_auxiliary(total, {**metrics, "weight": weight}, output.auxiliary, batch.weights)

        return Objective(
            loss=loss,
            frozen={name: teacher.params for name, teacher in zip(read, self.teachers, strict=True)},
            axes={name: teacher.axes for name, teacher in read.items()},
            prepare=spec.sequences.prepare,
        )
