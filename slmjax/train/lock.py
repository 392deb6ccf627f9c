"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from slmjax.errors import UserError
from slmjax.lock import hold


class Locked(UserError):
    """Another process works in the folder."""


def lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds `folder/.lock`.

    Raises:
        Locked: another process holds it.
    """
    said = "is at work here; wait for it, stop it, or choose another folder"
    return hold(folder / ".lock", lambda owner: Locked(f"{folder}: {owner} {said}"))
