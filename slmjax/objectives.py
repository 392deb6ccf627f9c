"""A model and losses (and, for distillation, a teacher) -> one objective."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from slmjax.data.labelled import LabelledText
from slmjax.data.spec import Data
from slmjax.errors import UserError
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.losses.classify import classify
from slmjax.losses.masked_lm import Masking, masked_lm
from slmjax.losses.next_token import next_token
from slmjax.models.assembly import Assembly
from slmjax.types import Model, Objective, Special


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

    @property
    def predicted(self) -> float:
        """The share of tokens whose logits are computed, for counting FLOPs."""
        return 1.0

    unit: ClassVar[str] = "token"
    """What the loss is a mean over, as a noun for messages"""

    def with_special(self, special: Special) -> ObjectiveSpec:
        """The same objective, with the special token ids of the data's tokenizer."""
        return self


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
