"""One process at a time works in a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from slmjax.errors import UserError


@contextlib.contextmanager
def hold(file: Path, refused: Callable[[str], UserError], wait: float = 0) -> Iterator[None]:
    """Holds a lock file, which says who does. The kernel lets go of it when the process dies, however it dies.

    Args:
        refused: who holds it (process and host) -> what to raise.
        wait: seconds until it is refused.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise refused(file.read_text().strip() or "another process") from None
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def held(file: Path, wait: float = 0) -> bool:
    """Whether a process, which may be this one, holds a lock file. Looking takes it for a moment, so that two processes
    that look at once are in each other's way, unless they `wait` (seconds)."""
    if not file.exists():
        return False
    lock = filelock.FileLock(file, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    lock.release()
    return False
