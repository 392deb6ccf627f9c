"""A model and losses (and, for distillation, a teacher) -> one objective."""

from __future__ import annotations

from dataclasses import dataclass

from slmjax.errors import UserError
from slmjax.losses.next_token import next_token
from slmjax.types import Model, Objective


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What a run minimises. A subclass is a frozen dataclass with `build`."""

    def build(self, model: Model) -> Objective:
        """The objective over this model's parameters."""
        raise TypeError(f"{type(self).__name__} does not define build(model) -> Objective")


@dataclass(frozen=True, kw_only=True)
class NextToken(ObjectiveSpec):
    """Cross-entropy of the next token, in nats, plus `z_loss` times the mean of (log Z)^2; see losses/next_token.py."""

    z_loss: float = 0.0
    chunk: int | None = None
    """Positions of each row whose logits exist at once; None: chosen by size"""

    def __post_init__(self):
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss: {self.z_loss} is negative; typical is 1e-4, or 0 for none")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"objective.chunk: {self.chunk} is not a positive number of positions, or None")

    def build(self, model: Model) -> Objective:
        def loss(params, frozen, batch, key):
            hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
            return next_token(
                model.unembed, params, hidden, batch.targets, batch.weights, z_loss=self.z_loss, chunk=self.chunk
            )

        return Objective(loss=loss)
