"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from slmjax.errors import UserError


class Locked(UserError):
    """Another process works in the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder/.lock`. The kernel lets go of it when the process dies, however it dies.

    Raises:
        Locked: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            owner = f.read().strip() or "another process"
            said = f"{folder}: {owner} is at work here; wait for it, stop it, or choose another folder"
            raise Locked(said) from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        yield
