"""Additional arrays of a batch, computed from it or looked up for it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from slmjax.data.token_store import Split, TokenStore
from slmjax.serialise import to_json
from slmjax.types import Batch


class Origin(NamedTuple):
    """Where the tokens of one row lie in a token store."""

    store: str
    """`TokenStore.fingerprint`"""
    split: Split
    index: np.ndarray
    """int64 [T]: the position of each token in the split; -1 for padding"""


class Extra(abc.ABC):
    """Arrays that are added to each batch as `Batch.extra`. A subclass is a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        """Some rows of a batch, numpy arrays [B, T] -> {name: numpy array [B, ...]}.

        A pure function: what a row gets depends on that row alone, so that it is the same on any number of hosts and
        after a resume. Called where rows are read, ahead of the step.
        """

    def located(self, batch: Batch, origins: Callable[[], Sequence[Origin]]) -> Mapping[str, Any]:
        """Like `__call__`, for arrays that are looked up by where the tokens of a row lie.

        Args:
            origins: () -> the origin of each row; rows after the last of them are padding.
        """
        return self(batch)

    def fits(self, stores: Sequence[TokenStore]) -> None:  # noqa: B027  most have nothing to check
        """Checks, when the data are opened, that there are such arrays for their stores.

        Raises:
            UserError: there are none, or they belong to other data.
        """

    def notes(self, length: int) -> tuple[str, ...]:
        """Lines for the log before training begins, on rows of `length` tokens."""
        return ()

    def identity(self) -> Any:
        """This value as JSON, for the experiment's identity: with the hash of a file in place of its path."""
        return to_json(self)


@dataclass(frozen=True, kw_only=True)
class NoExtra(Extra):
    """No additional arrays."""

    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        return {}


def added(batch: Batch, extra: Extra, origins: Callable[[], Sequence[Origin]] = tuple) -> Batch:
    """The batch with what `extra` adds. `origins`: see `Extra.located`; by default every row is padding."""
    return batch._replace(extra=dict(extra.located(batch, origins)))
