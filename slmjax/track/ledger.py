"""The events of a run: `ledger.jsonl`, append-only and on disk before the call returns.

The state of a run is read from here, and never guessed from an exit code. As a tracker, the ledger writes down the
events that the training loop reports.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.track.environment import redact
from slmjax.track.jsonl import JsonLines, read
from slmjax.track.tracker import Tracker

EVENTS = {  # event -> the state that a run is in after it, or None where it stays as it was
    "created": "queued",
    "started": "running",
    "resumed": "running",  # `step`: the one that training goes on after
    "saved": None,  # `step`: a checkpoint is complete
    "evaluated": None,
    "exported": None,
    "spike": None,  # a loss or gradient out of range, or not finite
    "rolled back": None,  # `step`: the one restored
    "preempted": "preempted",
    "failed": "failed",
    "diverged": "diverged",
    "complete": "complete",
}


class Ledger(Tracker):
    """Appends events. Each holds `event`, `time` (seconds since 1970), `attempt` (from 1), and what the caller adds."""

    def __init__(self, path: str | Path):
        """Raises StorageError where the file cannot be written or is damaged before its end."""
        self.path = Path(path)
        self._lines = JsonLines(path, durable=True)
        self.attempt = attempts(read(path))
        self._begun = False
        self._skipped: float | None = None

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Writes the event and waits until the disk has it.

        `started` begins an attempt, and adds the host and the process.

        Raises:
            StorageError: it cannot be written.
        """
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}; there are {', '.join(EVENTS)}")
        if event == "started":
            self.attempt += 1
            fields = {"host": platform.node(), "pid": os.getpid(), **fields}
        row = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields}
        self._lines.append(row)
        return row

    def events(self) -> list[dict[str, Any]]:
        return read(self.path)

    @property
    def status(self) -> str:
        """The state that the run is in."""
        return state_of(self.events())

    def resume(self, step: int) -> None:
        """`resumed` if the run has a checkpoint; `rolled back` at later calls."""
        if step > 0 or self._begun:
            self.append("rolled back" if self._begun else "resumed", step=step)
        self._begun, self._skipped = True, None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """`evaluated` where a validation loss is among the metrics, `spike` where another step was skipped."""
        if "validation/loss" in metrics:
            self.append("evaluated", step=step, loss=metrics["validation/loss"])
        skipped = metrics.get("skipped", 0.0)
        if self._skipped is not None and skipped > self._skipped:
            self.append("spike", step=step, loss=metrics.get("loss"), grad_norm=metrics.get("grad_norm"))
        self._skipped = skipped

    def artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """`saved` or `exported`."""
        self.append("saved" if kind == "checkpoint" else "exported", path=str(path), **metadata)

    def finish(self, status: str) -> None:
        """The status as an event, with the reason if an exception is being raised."""
        error = sys.exception()
        reason = {"reason": redact(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])} if error else {}
        self.append(status, **reason)
        self._lines.close()


def state_of(events: Sequence[Mapping[str, Any]]) -> str:
    """`queued`, `running`, `preempted`, `failed`, `diverged` or `complete`.

    A run whose process was killed stays `running` until it is started again: only then is the kill noticed.
    """
    state = "queued"
    for event in events:
        state = EVENTS.get(event["event"]) or state
    return state


def attempts(events: Sequence[Mapping[str, Any]]) -> int:
    """How often the run was started."""
    return sum(event["event"] == "started" for event in events)
