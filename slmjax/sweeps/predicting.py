"""The loss of a held-out cell: predicted, written down with the date, and compared when it has run."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import numpy as np

from slmjax.errors import UserError
from slmjax.files import write_text
from slmjax.scaling import identify
from slmjax.scaling.analysis import Settings, law_for
from slmjax.scaling.fit import fit
from slmjax.scaling.law import Law
from slmjax.scaling.runs import Runs
from slmjax.scaling.runs import read as read_runs
from slmjax.scaling.uncertainty import Bootstrap, bootstrap
from slmjax.sweeps.folder import Folder, Planned, read_json

FILE = "predictions.json"


def ahead(folder: Folder) -> str:
    """Predicts the held-out cell and writes predictions.json, unless that cell has begun: a prediction is never changed
    afterwards. Returns a line about it.

    Raises:
        UserError: the other runs cannot be fitted.
    """
    cell = folder.held_out
    assert cell is not None
    file = folder.path / FILE
    if not (file.is_file() and folder.run(cell).exists()):
        results = folder.write_results()
        found = predict(read_runs(results), cell, Settings(coupled=folder.coupled))
        found["results_sha256"] = sha256(results.read_bytes()).hexdigest()
        write_text(file, json.dumps({cell.hash: found}, indent=1) + "\n")
    found = read_json(file)[cell.hash]
    run = found["run"]
    return (
        f"{cell.hash} is held out: predicted loss {found['mean']['value']:.4f}, {found['level']:.0%} interval of the "
        f"run {run['low']:.4f} to {run['high']:.4f} ({file})"
    )


def predict(runs: Runs, cell: Planned, settings: Settings | None = None) -> dict[str, Any]:
    """The loss of the cell, with the intervals of the law there and of one run; what a line without a floor says.

    Raises:
        UserError: the runs cannot be fitted.
    """
    draws = refits(runs, Settings() if settings is None else settings)
    point = at(draws.fitted.law, cell)
    best = [budget[np.argmin(runs["loss"][budget])] for budget in runs.budgets] or list(range(len(runs)))
    line = math.nan
    if len(best) > 1:
        slope = np.polyfit(np.log(runs["flops"][best]), np.log(runs["loss"][best]), 1)
        line = math.exp(float(np.polyval(slope, math.log(cell.flops))))
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "label": cell.label,
        "flops": cell.flops,
        **point,
        "fitted_runs": len(runs),
        "level": draws.level,
        **draws.predict(**point).json(),
        "line_without_floor": line if math.isfinite(line) else None,
        "parameters": {name: estimate.json() for name, estimate in draws.parameters().items()},
    }


def refits(runs: Runs, settings: Settings) -> Bootstrap:
    """The law that the columns of the runs ask for, fitted, with its refits.

    Raises:
        UserError: the runs cannot be fitted.
    """
    identify.refuse(runs)
    law = law_for(runs, settings)
    fitted = fit(law, runs.columns, settings.criterion, method=settings.method)
    return bootstrap(fitted, settings.draws, level=settings.level, seed=settings.seed, cells=runs.cells)


def at(law: Law, cell: Planned) -> dict[str, float]:
    """The quantities of a cell that the law reads."""
    about = {"params": cell.params, "tokens": cell.tokens, "unique_tokens": cell.unique_tokens, **cell.tags}
    return {name: float(about.get(name, 16.0)) for name in law.columns}


def compared(folder: Folder) -> dict[str, Any] | None:
    """What was predicted of the held-out cell, and once it is complete also `actual`, the relative `error` of the
    prediction and of the line, and whether it is `inside` the interval; None if nothing was predicted."""
    cell = folder.held_out
    if cell is None or not (folder.path / FILE).is_file():
        return None
    found = read_json(folder.path / FILE).get(cell.hash)
    if found is None:
        raise UserError(f"{folder.path / FILE} predicts another cell; remove it")
    state = folder.states()[cell.hash]
    if state.name != "complete":
        return found
    run, line = found["run"], found["line_without_floor"]
    return found | {
        "actual": state.loss,
        "error": found["mean"]["value"] / state.loss - 1,
        "inside": run["low"] <= state.loss <= run["high"],
        "error_of_line": None if line is None else line / state.loss - 1,
    }
