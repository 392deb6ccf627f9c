"""`slmjax sweep status|propose`: how far a sweep is, what it says by now, and what would make that surer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from slmjax.cli import tables
from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

if TYPE_CHECKING:
    from slmjax.sweeps.folder import Folder, State


@dataclass(frozen=True, kw_only=True)
class Dir:
    dir: Annotated[str, tyro.conf.Positional]
    """The sweep's folder"""
    target: str | None = None
    """The run to predict, such as params=1e6,tokens=2e7; default: the held-out cell"""


@dataclass(frozen=True, kw_only=True)
class ProposeArgs(Dir):
    count: int = 5
    """Cells to show"""


def status(argv: list[str]) -> int:
    args = parse(
        Dir, argv, prog="slmjax sweep status", description="The state of every cell, the time left, and how well the "
        "law of the cells that are complete predicts the held-out one, or --target, by now.",
        example="slmjax sweep status runs/chinchilla",
    )  # fmt: skip
    from rich.table import Table

    from slmjax.sweeps import folder as folders
    from slmjax.track.progress import duration

    folder = folders.read(at(args.dir))
    states = folder.states()
    table = Table(title=folder.name, title_justify="left")
    for name in ("cell", "", "state", "step", "loss", "elapsed", "left", "reason"):
        table.add_column(name, justify="left" if name in ("cell", "", "state", "reason") else "right", overflow="fold")
    left = remaining(folder, states)
    for cell in folder.cells:
        state = states[cell.hash]
        loss = "" if math.isnan(state.loss) else f"{state.loss:.4f}"
        held = " (held out)" if cell.held_out else ""
        table.add_row(
            cell.hash, cell.label + held, state.name, f"{state.step}/{cell.steps}", loss,
            duration(state.seconds) if state.seconds else "", duration(left[cell.hash]) if left[cell.hash] else "",
            state.reason,
        )  # fmt: skip
    tables.show(table)
    names = [state.name for state in states.values()]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    total = sum(left.values())
    print(f"{counts}; about {duration(total)} of training left, one at a time" if total else counts)
    if folder.held_out is None and args.target is None:
        return 0
    from slmjax.sweeps import narrowing

    try:
        found = narrowing.current(folder, point(args.target))
    except UserError as error:
        if args.target is not None:
            raise
        print(f"no prediction of the held-out cell yet: {error}")
        return 0
    print(found)
    if offered := narrowing.proposals(found, narrowing.waiting(folder, states)):
        best = offered[0]
        print(f"the next cell that helps most: {best.cell.hash} ({best.cell.label}), to about ±{best.half_width:.2%}")
    return 0


def remaining(folder: Folder, states: dict[str, State]) -> dict[str, float]:
    """Estimated seconds of training left, by cell: corrected by what the runs so far took."""
    ran = [(c, states[c.hash]) for c in folder.cells if states[c.hash].seconds and states[c.hash].step]
    expected = sum(cell.seconds * max(state.step - cell.shared, 0) / cell.steps for cell, state in ran)
    slower = sum(state.seconds for _, state in ran) / expected if expected else 1.0
    return {
        cell.hash: slower * cell.seconds * (1 - max(states[cell.hash].step, cell.shared) / cell.steps)
        if states[cell.hash].name in ("waiting", "running", "failed")
        else 0.0
        for cell in folder.cells
    }


def propose(argv: list[str]) -> int:
    args = parse(
        ProposeArgs, argv, prog="slmjax sweep propose",
        description="Which cell would narrow the interval of the prediction most, by the refits of the bootstrap: of "
        "those that have not begun, or if none is left, of the sizes and budgets of the sweep and twice its largest.",
        example="slmjax sweep propose runs/chinchilla\n  slmjax sweep propose runs/mine --target params=1e6,tokens=2e7",
    )  # fmt: skip
    from rich.table import Table

    from slmjax.sweeps import folder as folders
    from slmjax.sweeps import narrowing
    from slmjax.track.progress import duration

    if args.count < 1:
        raise UserError(f"--count is {args.count}; expected at least 1")
    folder = folders.read(at(args.dir))
    found = narrowing.current(folder, point(args.target))
    waiting = narrowing.waiting(folder, folder.states())
    offered = narrowing.proposals(found, waiting or narrowing.imagined(folder))[: args.count]
    print(found)
    title = "cells of the sweep that have not begun" if waiting else "runs that the sweep does not have"
    table = Table(title=title, title_justify="left")
    for name in ("cell", "", "FLOPs", "time", "interval after it"):
        table.add_column(name, justify="left" if name in ("cell", "") else "right", overflow="fold")
    for each in offered:
        cell = each.cell
        about = (cell.hash, cell.label, f"{cell.flops:.3g}", duration(cell.own * cell.seconds))
        table.add_row(*about, f"± {each.half_width:.2%}")
    tables.show(table)
    print(
        f"next:\n  slmjax sweep run {args.dir}"
        if waiting
        else "next:\n  add such cells to the sweep's file, plan again"
    )
    return 0


def point(target: str | None) -> dict[str, float] | None:
    """`params=1e6,tokens=2e7` as numbers by name."""
    from slmjax.cli.fit import named_numbers

    return None if target is None else named_numbers("--target", target)
