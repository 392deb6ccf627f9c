"""Signals that ask a process to stop, noted while a block of code runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers, and Ctrl-C, send to stop a process"""


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context manager: `handler(number, frame)` answers each of `STOPS`; afterwards their handlers are as before.

    Python runs signal handlers in the main thread only: entered in another thread, it changes nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in STOPS} if main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """A context manager: the list of the numbers of those of `STOPS` that were received inside it, in order."""
    received: list[int] = []
    with handled(lambda number, _: received.append(number)):
        yield received
