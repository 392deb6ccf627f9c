"""What the loop talks to: data, tracker and hooks, as protocols and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from slmjax.train.step import Program
from slmjax.types import Batch, Frozen, TrainState


@runtime_checkable
class Data(Protocol):
    """An endless iterator over this process's rows, whose position can be saved."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """JSON; restoring it makes `__next__` give what it would have given. May hold `epoch` (a float)."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go. Every call is made on process 0 alone."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def artifact(self, path: Path, kind: str, metadata: dict[str, Any]) -> None: ...

    def resume(self, step: int) -> None:
        """Training goes on after `step`: what was logged of later steps is void."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON kept in each checkpoint (a W&B run id)"""
        ...

    def finish(self, status: str) -> None: ...


class At(NamedTuple):
    """What a hook sees after a step."""

    step: int
    """Steps done"""
    steps: int
    """Steps of the whole run"""
    state: TrainState
    """Borrowed: the next step donates it"""
    program: Program
    frozen: Frozen
    tracker: Tracker
    workdir: Path
    say: Callable[[str], None]
    """One line for the log"""


class Hook(Protocol):
    """A value that acts every `every` steps and after the last."""

    every: int

    def __call__(self, at: At) -> Mapping[str, float]:
        """-> metrics, logged with those of the step"""
        ...
