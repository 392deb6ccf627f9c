"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from slmjax.errors import UserError
from slmjax.lock import hold


class Locked(UserError):
    """Another process is using the folder."""


def lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A context manager that holds `folder/.lock`.

    Raises:
        Locked: another process holds it.
    """
    advice = "wait for it, stop it, or choose another folder"
    return hold(folder / ".lock", lambda owner: Locked(f"{folder}: {owner} is at work here; {advice}"))
