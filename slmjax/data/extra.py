"""Additional arrays of a batch, computed from it or looked up for it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmjax.serialise import to_json
from slmjax.types import Batch


class Extra(abc.ABC):
    """Arrays that are added to each batch as `Batch.extra`. A subclass is a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        """Some rows of a batch, numpy arrays [B, T] -> {name: numpy array [B, ...]}.

        A pure function: what a row gets depends on that row alone, so that it is the same on any number of hosts and
        after a resume. Called where rows are read, ahead of the step.
        """

    def identity(self) -> Any:
        """This value as JSON, for the experiment's identity: with the hash of a file in place of its path."""
        return to_json(self)


@dataclass(frozen=True, kw_only=True)
class NoExtra(Extra):
    """No additional arrays."""

    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        return {}


def added(batch: Batch, extra: Extra) -> Batch:
    """The batch with what `extra` adds."""
    return batch._replace(extra=dict(extra(batch)))
