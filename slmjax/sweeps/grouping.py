"""Which cells train together as one program, and whether what runs at a time fits into memory.

Nothing here imports jax: a process that watches runs must not take their device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence

from slmjax.errors import UserError
from slmjax.sweeps.folder import ENDED, Folder, Planned, State
from slmjax.track.progress import si

MOST = 8
"""Cells that train together unless another number is asked for"""
PROCESS = 4e8
"""Bytes of a process besides its arrays: the interpreter, jax, compiled programs"""


def free_memory(folder: Folder) -> float:
    """Bytes that this process's runs may use now: on a CPU what is free on this machine, at most what a device has by
    the plan; else what a device has."""
    if folder.device != "cpu":
        return folder.memory
    import psutil

    return min(float(psutil.virtual_memory().available), folder.memory)


def refuse_too_many(folder: Folder, states: dict[str, State], workers: int, free: float) -> None:
    """
    Raises:
        UserError: the largest cells that may run at the same time need more memory than there is.
    """
    left = sorted((c.memory + PROCESS for c in folder.cells if states[c.hash].name not in ENDED), reverse=True)
    needed = sum(left[:workers])
    if workers > 1 and needed > free:
        fitting = max(n for n in range(1, workers) if n == 1 or sum(left[:n]) <= free)
        raise UserError(
            f"--workers is {workers}, but {min(workers, len(left))} cells at a time may take {si(needed)}B, of which "
            f"{si(free)}B are free; use --workers {fitting}"
        )


def group(
    cell: Planned, others: Sequence[Planned], *, most: int | None, workers: int, free: float, apart: Collection[str]
) -> list[Planned]:
    """The cell, and those of `others` that train with it.

    Args:
        others: that may start now as well.
        most: cells of a group; None: `MOST`.
        workers: groups at a time. Cells are left for those that have none yet.
        free: bytes of memory of all groups together.
        apart: hashes of cells that train alone.
    """
    if not cell.shape or cell.held_out or cell.hash in apart:
        return [cell]
    mates = [c for c in others if c.shape == cell.shape and c.hash not in apart and not c.held_out]
    fitting = math.floor((free / workers - PROCESS) / cell.memory) if cell.memory else len(mates)
    size = min(MOST if most is None else most, fitting, math.ceil(len(mates) / workers))
    return [cell, *(c for c in mates if c.hash != cell.hash)][: max(1, size)]


def apart(folder: Folder) -> set[str]:
    """Cells whose group ended without them: they go on alone, so that one which fails does not take others with it."""
    return {event["cell"] for event in folder.events() if event["event"] == "apart"}


def label(cells: Sequence[Planned], shown: Callable[[float], str]) -> str:
    """What is started, for people."""
    what = cells[0].label if len(cells) == 1 else f"{len(cells)} cells as one program: " + "; ".join(
        cell.label for cell in cells
    )  # fmt: skip
    return f"{what}, about {shown(sum(cell.seconds for cell in cells))}"


def command(folder: Folder, cells: Sequence[Planned], options: Sequence[str]) -> list[str]:
    """The command line of cells that train together, or go on from another cell."""
    code = ["--code", folder.source] if any(cell.code for cell in cells) else []
    words = [sys.executable, "-m", "slmjax.cli.main", "sweep", "cells", str(folder.path), *code]
    return [*words, *(cell.hash for cell in cells), "--", *options]
