"""Which tokens of a batch count in the loss: a value that gives each target its weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmjax.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """Rows of packed documents -> the weight of each target."""

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """The weights, float32 [B, T]. Where there is no target (padding, the last token of a document) the weight is 0
        whatever this returns.

        Args:
            tokens, targets, segment_ids, positions: int32 [B, T], as in `types.Batch`.
        """
        raise TypeError(f"{type(self).__name__} is not a weighting: use EveryToken or AfterToken")


@dataclass(frozen=True, kw_only=True)
class EveryToken(Weighting):
    """Weight 1 for every target."""

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        return np.ones(tokens.shape, np.float32)


@dataclass(frozen=True, kw_only=True)
class AfterToken(Weighting):
    """Weight 1 for what follows a token in its document, 0 for what stands before it: the completion of a prompt.

    The first target that counts is the one right after the token. A document counts from the first such token on; one
    without it, and the part of a long document that lies in a later row than its token, count nothing, so `data.length`
    should be that of the longest document.
    """

    token: int
    """Its id (`Tokenizer.raw.token_to_id`)"""

    def __post_init__(self) -> None:
        if self.token < 0:
            raise DataError(f"data.weighting.token is {self.token}; expected the id of a token, 0 or more")

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        length = tokens.shape[1]
        at = np.where(tokens == self.token, np.arange(length), -1)
        latest = np.maximum.accumulate(at, axis=1)  # the last such token up to here, in this row
        begins = np.arange(length) - positions  # where this document begins in the row
        return ((latest >= begins) & (segment_ids > 0)).astype(np.float32)
