"""The training loss of a run along its learning rates, for the multi-power law (`scaling.curves`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slmjax.errors import UserError
from slmjax.experiment_file import load_experiment
from slmjax.scaling.curves import Curve, Schedule
from slmjax.track.jsonl import read

POINTS = 100
"""Of a curve: each the mean of as many neighbouring steps as that takes"""


def of_run(folder: Path) -> Curve:
    """The curve of a run folder, as far as it has trained, on the learning rates of all its steps.

    Raises:
        UserError: it is no run folder, or has trained for fewer than ten steps after its warm-up.
    """
    experiment, _ = load_experiment(str(folder))
    lr = np.broadcast_to(
        np.asarray(experiment.schedule.build(experiment.steps)(np.arange(experiment.steps)), np.float64),
        (experiment.steps,),
    )
    rows = [row for row in read(folder / "metrics.jsonl") if np.isfinite(row["loss"])]
    steps = np.asarray([row["step"] for row in rows], int) - 1  # the loss of step n is that before its update
    after = steps >= experiment.schedule.warmup_steps
    if after.sum() < 10:
        raise UserError(f"{folder}: {int(after.sum())} steps after the warm-up are no curve; expected at least 10")
    loss = np.asarray([row["loss"] for row in rows])[after]
    parts = np.array_split(np.arange(len(loss)), min(POINTS, len(loss)))
    middle = np.asarray([round(float(steps[after][part].mean())) for part in parts])
    return Curve(Schedule(lr), middle, np.asarray([loss[part].mean() for part in parts]))
