"""A model and losses (and, for distillation, a teacher) -> one objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.data.labelled import LabelledText
from slmjax.data.spec import Data
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.classify import classify
from slmjax.losses.masked_lm import Masking, masked_lm, masked_positions
from slmjax.losses.next_token import next_token
from slmjax.models.assembly import Assembly
from slmjax.serialise import to_json
from slmjax.types import Batch, Model, Objective, Special
from slmjax.views import Carried


class Scored(NamedTuple):
    """The positions of a batch whose outputs a loss reads."""

    at: jax.Array | None  # int [B, n]: their indices in the row; None: every position, n = T
    targets: jax.Array  # int32 [B, n]
    weights: jax.Array  # float32 [B, n]

    def of(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, n, D]"""
        return hidden if self.at is None else jnp.take_along_axis(hidden, self.at[..., None], axis=1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What a run minimises. A subclass is a frozen dataclass with `build`."""

    def build(self, model: Model) -> Objective:
        """The objective over this model's parameters."""
        raise TypeError(f"{type(self).__name__} does not define build(model) -> Objective")

    def fits(self, model: Assembly) -> None:
        """Checks that a model of this kind can be trained towards this objective.

        Raises:
            UserError: the model lacks the outputs that the objective needs, or sees the tokens that it is to predict.
        """

    def reads(self, model: Assembly, data: Data) -> None:
        """Checks that batches of these data hold the targets of this objective.

        Raises:
            UserError: they hold other targets.
        """

    def ready(self, data: Data, models: Mapping[str, str]) -> None:
        """Checks, when a run begins, that what the data read from disk belongs to this objective and its models.

        Args:
            models: the content hash of each of `models()`.

        Raises:
            UserError: it does not.
        """

    @property
    def predicted(self) -> float:
        """The share of tokens whose logits are computed, for counting FLOPs."""
        return 1.0

    unit: ClassVar[str] = "token"
    """What the loss is a mean over, as a noun for messages"""
    same_tokens: ClassVar[bool] = True
    """Whether `models()` must have the tokenizer of the data"""

    def with_special(self, special: Special) -> ObjectiveSpec:
        """The same objective, with the special token ids of the data's tokenizer."""
        return self

    def scored(self, model: Model, batch: Batch) -> Scored:
        """The positions of a batch (after `Objective.prepare`) that are predicted, for losses that compare models.

        Raises:
            UserError: this objective does not predict tokens or labels.
        """
        raise UserError(
            f"objective.task is {type(self).__name__}, which does not say what it predicts; use NextToken()"
        )

    def models(self) -> tuple[str, ...]:
        """Trained models that the objective reads, each written as the MODEL of a command."""
        return ()

    @property
    def output_tables(self) -> bool:
        """Whether folders with the output table of a model alone will do for `models()`."""
        return False

    def accepts(self, source: str, theirs: Assembly, model: Assembly, length: int) -> None:
        """Checks that one of `models()` fits the model that is trained, before it is put into memory.

        Args:
            source: as `models()` has it.
            theirs: its shape.
            model: the shape of the model that is trained.
            length: tokens of a sequence of the data.

        Raises:
            UserError: it does not.
        """

    def with_models(self, models: Sequence[Any], *, tokens: int) -> ObjectiveSpec:
        """The same objective with its models in memory.

        Args:
            models: a `distill.teacher.Teacher` for each of `models()`.
            tokens: ids of the data's tokenizer, from 0.
        """
        return self

    def carried(self, model: Assembly) -> Carried | None:
        """What it keeps from step to step beside the parameters of this model: trainable matrices, the number of
        updates (`views.carrying`). None: nothing."""
        return None

    def identity(self, models: Mapping[str, str]) -> Any:
        """This value as JSON, for the experiment's identity. `models`: the content hash of each of `models()`, which
        takes the place of its path."""
        return to_json(self)

    def more_flops(self, model: Assembly, length: int) -> float:
        """FLOPs a token of a training step in addition to those of the trained model, at sequences of that length.

        Args:
            model: the model that is trained.
        """
        return 0.0


@dataclass(frozen=True, kw_only=True)
class NextToken(ObjectiveSpec):
    """Cross-entropy of the next token, in nats, plus `z_loss` times the mean of (log Z)^2 (losses/next_token.py), plus
    what parts of the model add (losses/auxiliary.py)."""

    z_loss: float = 0.0
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""

    def __post_init__(self):
        _check(self.z_loss, self.chunk)

    def fits(self, model: Assembly) -> None:
        if not model.causal:
            raise UserError("objective is NextToken, but an encoder sees the next token: set objective=MaskedLM()")
        if not model.predicts_tokens:
            raise UserError("objective is NextToken, but model.head predicts no tokens: set objective=Classify()")

    def reads(self, model: Assembly, data: Data) -> None:
        if not data.next_tokens:
            raise UserError(
                f"objective is NextToken, but data is {type(data).__name__}, which has no next tokens; use PackedText"
            )

    def scored(self, model: Model, batch: Batch) -> Scored:
        return Scored(None, batch.targets, batch.weights)

    def build(self, model: Model) -> Objective:
        def loss(params, frozen, batch, key):
            output = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
            targets, weights = batch.targets, batch.weights
            loss_and_metrics = next_token(
                model.unembed, params, output.hidden, targets, weights, z_loss=self.z_loss, chunk=self.chunk
            )
            return with_auxiliary(*loss_and_metrics, output.auxiliary, weights)

        return Objective(loss=loss)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(ObjectiveSpec):
    """Cross-entropy of masked tokens, predicted from the tokens on both sides, in nats a masked token; see
    losses/masked_lm.py. For encoders.

    Which tokens are masked follows from the key of the step: another choice in each step, the same when it is repeated.
    """

    masking: Masking = field(default_factory=Masking)
    z_loss: float = 0.0
    """Factor on the mean of (log Z)^2"""
    chunk: int | None = None
    """Masked tokens of each row whose logits exist at once; None: chosen by size"""
    special: Special | None = None
    """Ids of the mask token and of the tokens that are never masked; None: those of the data's tokenizer"""
    unit: ClassVar[str] = "masked token"

    def __post_init__(self):
        _check(self.z_loss, self.chunk)

    def fits(self, model: Assembly) -> None:
        if not model.predicts_tokens:
            raise UserError("objective is MaskedLM, but model.head predicts no tokens; set model.head to MaskedWords")

    @property
    def predicted(self) -> float:
        """`masking.rate`"""
        return self.masking.rate

    def with_special(self, special: Special) -> MaskedLM:
        """The same objective, with these special token ids unless the experiment names its own."""
        return self if self.special is not None else replace(self, special=special)

    def scored(self, model: Model, batch: Batch) -> Scored:
        at = masked_positions(batch, self.masking.most(batch.tokens.shape[1]))
        return Scored(at, *(jnp.take_along_axis(x, at, axis=1) for x in (batch.targets, batch.weights)))

    def build(self, model: Model) -> Objective:
        def prepare(batch, key):
            if self.special is None:
                raise UserError(
                    "objective.special is None; give the special token ids of the tokenizer, or call with_special"
                )
            return self.masking(batch, key, vocab=model.vocab, special=self.special)

        def loss(params, frozen, batch, key):
            output = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
            most = self.masking.most(batch.tokens.shape[1])
            loss_and_metrics = masked_lm(
                model.unembed, params, output.hidden, batch, most, z_loss=self.z_loss, chunk=self.chunk
            )
            return with_auxiliary(*loss_and_metrics, output.auxiliary, batch.weights)

        return Objective(loss=loss, prepare=prepare)


@dataclass(frozen=True, kw_only=True)
class Classify(ObjectiveSpec):
    """Cross-entropy of the label of a text, in nats a text, for models with a head for labels; see losses/classify.py.

    Reads `LabelledText`: one text a row, its label in `Batch.extra["labels"]`.
    """

    unit: ClassVar[str] = "text"

    def fits(self, model: Assembly) -> None:
        if not model.labels:
            raise UserError(
                "objective is Classify, but the model scores no labels: set model.head to Classifier(labels=...) of an "
                "encoder, or LastTokenScore(labels=...) of a decoder"
            )

    def reads(self, model: Assembly, data: Data) -> None:
        if not isinstance(data, LabelledText):
            raise UserError(
                f"objective is Classify, but data is {type(data).__name__}, which has no labels; use LabelledText"
            )
        if data.closed != model.reads_end:
            kind = "an encoder reads" if model.reads_end else "a decoder is read at the last token of"
            raise UserError(f"data.closed is {data.closed}, but {kind} a text; set data.closed={model.reads_end}")

    @property
    def predicted(self) -> float:
        """0: the head reads one token of a text, too few to count"""
        return 0.0

    def scored(self, model: Model, batch: Batch) -> Scored:
        labels, weights = batch.extra["labels"], batch.weights.sum(axis=1)
        return Scored(model.read_at(batch.segment_ids)[:, None], labels[:, None], weights[:, None])

    def build(self, model: Model) -> Objective:
        def loss(params, frozen, batch, key):
            hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
            return classify(model.unembed, params, hidden, batch, model.read_at(batch.segment_ids))

        return Objective(loss=loss)


def _check(z_loss: float, chunk: int | None) -> None:
    if z_loss < 0:
        raise UserError(f"objective.z_loss: {z_loss} is negative; typical is 1e-4, or 0 for none")
    if chunk is not None and chunk < 1:
        raise UserError(f"objective.chunk: {chunk} is not a positive number of positions, or None")
