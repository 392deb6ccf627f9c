"""One run at a time in a folder; a run that a later attempt has taken over from writes no more."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Protocol, runtime_checkable

from slmjax.errors import UserError
from slmjax.lease import Lease, Superseded, lease

NAME = ".lock"
FILES = (NAME, f"{NAME}.lease")
"""What a lock leaves in its folder"""


class Locked(UserError):
    """Another process is using the folder."""


@runtime_checkable
class Fence(Protocol):
    """What is asked before each write of a run; a `Lease` is one."""

    def check(self, *, now: bool = False) -> None:
        """Raises Superseded if the run may write no more; `now`: for a write that nothing can undo."""
        ...

    def mine(self) -> bool:
        """Whether the run may write."""
        ...


class Open:
    """The fence of a process that writes nothing of its own, or whose folder nobody else uses: always open."""

    def check(self, *, now: bool = False) -> None: ...

    def mine(self) -> bool:
        return True


OPEN = Open()


def lock(folder: Path) -> contextlib.AbstractContextManager[Lease]:
    """A context manager that holds `folder/.lock` (`NAME`) and its lease.

    Raises:
        Locked: another process holds it.
    """
    advice = "wait for it, stop it, or choose another folder"

    def leave() -> None:  # the training loop, which would have noticed, is stuck
        print(f"slmjax: error: {folder}: a later attempt has taken over; this one ends", file=sys.stderr, flush=True)
        os._exit(Superseded.code)

    return lease(folder / NAME, lambda owner: Locked(f"{folder}: {owner} is at work here; {advice}"), taken_over=leave)
