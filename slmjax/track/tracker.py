"""The interface through which the training loop reports what happens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Ignores everything. Subclasses override the methods for what they record.

    All calls come from one thread of the first process: `restore` where there is a checkpoint, then `resume`, then
    `log` and `artifact`, `resume` again at each rollback, and `finish` in the end, also after an exception.
    """

    def restore(self, state: Mapping[str, Any]) -> None:
        """The `state` that a checkpoint kept."""

    def resume(self, step: int) -> None:
        """Training goes on after `step` (0: begins); what was logged for later steps is to be discarded."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step."""

    def artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """A "checkpoint" or an "export" is complete."""

    def state(self) -> dict[str, Any]:
        """JSON, kept in each checkpoint."""
        return {}

    def finish(self, status: str) -> None:
        """complete, preempted, diverged or failed."""
