"""What all ways to prune a trained model have in common."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.types import Batch, Params

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


@dataclass(frozen=True, kw_only=True)
class Pruning(abc.ABC):
    """How a trained model is made sparser or smaller."""

    sparsity: float
    """Share of the weights, layers or hidden channels that is removed"""

    def __post_init__(self):
        if not 0 < self.sparsity < 1:
            raise UserError(f"--sparsity is {self.sparsity}; expected more than 0 and less than 1, such as 0.5")

    reads_data = True
    """Whether it needs calibration data"""

    @abc.abstractmethod
    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        """The pruned model and its parameters (float32, as numpy arrays)."""


def decoder_of(model: Assembly) -> Decoder:
    """
    Raises:
        UserError: the model is no decoder.
    """
    if not isinstance(model, Decoder):
        raise UserError(f"--method depth and width cut decoders; this is a {type(model).__name__}")
    return model


def left(number: int, sparsity: float, what: str) -> int:
    """How many of `number` are left.

    Raises:
        UserError: none, or all.
    """
    keep = round(number * (1 - sparsity))
    if not 1 <= keep < number:
        raise UserError(f"--sparsity is {sparsity}: that leaves {keep} of {number} {what}; choose another share")
    return keep


def as_numpy(model: Assembly, params: Params) -> tuple[Assembly, Params]:
    """The two, the parameters as numpy arrays."""
    return model, jax.tree.map(np.asarray, params)
