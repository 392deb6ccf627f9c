"""Signals that stop a run: it saves a checkpoint first, then ends with an exit code for schedulers."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from slmjax.errors import Preempted
from slmjax.signals import handled


class Interrupted(Preempted):
    """Ctrl-C; the run has saved a checkpoint. The exit code is the shell's for Ctrl-C, so that a scheduler does not
    requeue the run."""

    code = 130


class Signals:
    """A context manager that records SIGTERM, SIGUSR1 and Ctrl-C; a second Ctrl-C ends the process at once.

    Python runs signal handlers in the main thread only: entered in another thread, it records nothing.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._handled = handled(self._note)
        self._handled.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handled.__exit__(*raised)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a save in progress is lost, earlier checkpoints are not
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number)

    def error(self, step: int) -> Preempted:
        """The exception to raise once `step` is saved. The signal's name is unknown if another process received it."""
        name = self.received.name if self.received else "another process"
        kind = Interrupted if self.received == signal.SIGINT else Preempted
        return kind(f"stopped by {name} after step {step}, which is saved: run the same command again to go on")
