"""A planned sweep as the configuration of a W&B sweep, for those whose machines run `wandb agent`."""

from __future__ import annotations

from pathlib import Path

import yaml

from slmjax.errors import StorageError, UserError
from slmjax.files import write_text
from slmjax.sweeps.folder import Folder


def write(folder: Folder, file: Path) -> None:
    """Writes YAML for `wandb sweep FILE`: a grid over the cells, each of which an agent trains by `slmjax sweep cells`.

    The held-out cell is not among them: `slmjax sweep run` predicts its loss from the others before it trains it.

    Raises:
        UserError: the sweep has rounds of successive halving, whose later cells depend on the earlier ones.
        StorageError: the file cannot be written.
    """
    if any(cell.rung for cell in folder.cells):
        raise UserError(
            "--wandb-sweep: a W&B grid runs every cell, but the rounds of successive halving depend on those before; "
            "use slmjax sweep run"
        )
    cells = [cell.hash for cell in folder.cells if not cell.held_out]
    described = {
        "name": folder.name,
        "method": "grid",
        "metric": {"name": "validation/loss", "goal": "minimize"},
        "parameters": {"cell": {"values": cells}},
        "command": ["${env}", "slmjax", "sweep", "cells", str(folder.path), "${args_no_hyphens}"],
    }
    try:
        write_text(file, yaml.safe_dump(described, sort_keys=False))
    except OSError as error:
        raise StorageError(f"--wandb-sweep {file} cannot be written ({error.strerror or error})") from None
