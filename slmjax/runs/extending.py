"""A longer run from the part of a shorter one that both have in common: `slmjax train RUN --extend N`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slmjax.config import Experiment, Runtime
from slmjax.errors import UserError
from slmjax.runs.branching import begin
from slmjax.runs.parent import made, parent_of
from slmjax.runs.rates import parting, rates
from slmjax.serialise import differences, to_json
from slmjax.train.checkpoint_folder import steps

FREE = ("steps", "schedule", "view")
"""Of an experiment's identity: what a longer run may have otherwise, if it comes to the same up to the checkpoint"""


def extend(parent: str | Path, experiment: Experiment, runtime: Runtime) -> int:
    """Makes the run folder `runtime.workdir`, with the parent's newest checkpoint that the longer run would have made
    as well: one from before its learning rate fell. `train` then goes on from it, bit for bit as if it had had all the
    steps from the beginning. The parent stays as it is. Nothing is done if the folder is a run already.

    Args:
        experiment: the parent's, with more steps.

    Returns:
        The step.

    Raises:
        UserError: the two differ in something else, or the parent has no checkpoint of an early enough step.
        StorageError: the parent cannot be read, or the folder cannot be written.
    """
    if (done := made(runtime.workdir)) is not None:
        return done
    run = parent_of(parent)
    before = run.experiment
    identified_by = run.identity_of(experiment)
    if changed := differences(_fixed(run.config["identity"]), _fixed(identified_by)):
        raise UserError(f"{parent} cannot be the beginning of this run; it differs in {'; '.join(changed)}")
    common = parting(rates(before), rates(experiment))
    views = [to_json(run.view.over(run.steps)) for run in (before, experiment)]
    if changed := differences(*views):
        raise UserError(
            f"{parent} cannot be continued: what its view does depends on the number of steps ({'; '.join(changed)})"
        )
    saved = [step for step in steps(run.folder / "checkpoints") if 0 < step <= common]
    if not saved:
        kind = type(experiment.schedule).__name__
        fix = (
            f"with the schedule {kind} every step depends on their number; train anew with WSD, Constant or InverseSqrt"
            if common <= experiment.schedule.warmup_steps
            else f"train it again with --runtime.checkpoints.keep-steps {common}"
        )
        raise UserError(f"{parent} has no checkpoint of the first {common} steps, which the longer run shares; {fix}")
    begin(run, experiment, identified_by, saved[-1], runtime)
    return saved[-1]


def longer(parent: str | Path, more: int) -> Experiment:
    """The experiment of a run with `more` steps."""
    before = parent_of(parent).experiment
    return replace(before, steps=before.steps + more)


def _fixed(identified_by: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identified_by.items() if name not in FREE}
