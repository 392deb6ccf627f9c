"""Being told to stop: save first, then leave with a code that says so."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from slmjax.errors import Preempted

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Preempted):
    """Ctrl-C, and the run has saved. The shell's code for it, so that a scheduler does not requeue."""

    code = 130


class Signals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C while it is entered; a second Ctrl-C ends the process at once.

    Handlers belong to the main thread: entered from another one, it notes nothing.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, self._note) for s in STOPS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # earlier checkpoints are whole: a save in flight is lost
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number)

    def error(self, step: int) -> Preempted:
        """What to raise once step `step` is saved. Where another process got the signal, its name is unknown here."""
        name = self.received.name if self.received else "another process"
        kind = Interrupted if self.received == signal.SIGINT else Preempted
        return kind(f"stopped by {name} after step {step}, which is saved: run the same command again to go on")
