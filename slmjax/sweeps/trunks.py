"""Cells that differ in their number of steps alone share their first steps: a longer one goes on from a checkpoint of
the next shorter one before the decay of its learning rate (Hägele et al. 2024, arXiv:2405.18392)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from slmjax.config import Experiment, Runtime
from slmjax.errors import UserError
from slmjax.runs.branching import branch, possible, same_steps
from slmjax.serialise import fingerprint, to_json
from slmjax.sweeps.folder import Folder, Planned

WORTH = 0.2
"""Share of a cell's steps that it has to have in common with a shorter one, at least"""


def shared(cells: Sequence[Planned], experiments: Mapping[str, Experiment]) -> list[Planned]:
    """The cells, those with the trunk that can go on from another one, and these with the step to keep.

    Args:
        experiments: of each cell by its hash.
    """
    alike: dict[str, list[Planned]] = {}
    for cell in cells:
        if cell.rung is None and not cell.held_out:
            described = to_json(experiments[cell.hash]) | {"name": "", "steps": 0}
            alike.setdefault(fingerprint(described), []).append(cell)
    changed: dict[str, Planned] = {}
    for several in alike.values():
        several.sort(key=lambda cell: cell.steps)
        for shorter, longer in itertools.pairwise(several):
            same = same_steps(experiments[shorter.hash], experiments[longer.hash])
            if same >= WORTH * longer.steps:
                changed[longer.hash] = replace(longer, trunk=shorter.hash, shared=same)
                changed[shorter.hash] = replace(changed.get(shorter.hash, shorter), keep=same)
    return [changed.get(cell.hash, cell) for cell in cells]


def begin(folder: Folder, cell: Planned, experiment: Experiment, runtime: Runtime) -> None:
    """Makes the run folder of a cell from a checkpoint of its trunk, if it has one; else the cell begins at step 0."""
    run = folder.run(cell)
    if not cell.trunk or (run / "config.json").exists():
        return
    trunk = next(each for each in folder.cells if each.hash == cell.trunk)
    if not possible(folder.run(trunk), cell.shared):
        return
    try:
        branch(folder.run(trunk), experiment, runtime)
    except UserError as error:
        raise UserError(f"{cell.hash} cannot go on from {trunk.hash}: {error}") from error
