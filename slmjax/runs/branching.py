"""A run that begins as another one did: quantization-aware training that follows full precision, many times, for the
price of one run in full precision; runs of several lengths, whose learning rates differ only where they decay."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slmjax import tree
from slmjax.compress.quant.view import Quantize, quantizes
from slmjax.config import Experiment, Runtime
from slmjax.errors import StorageError, UserError
from slmjax.files import at
from slmjax.runs import folder as runs
from slmjax.runs.build import states_of
from slmjax.runs.parent import Parent, made, parent_of
from slmjax.serialise import differences, fingerprint, to_json
from slmjax.track.jsonl import encode, read
from slmjax.track.ledger import Ledger
from slmjax.train import stored
from slmjax.train.checkpoint import Checkpointer
from slmjax.train.checkpoint_folder import restore, steps
from slmjax.types import TrainState
from slmjax.views import Identity

NOT_TAKEN = (
    "checkpoints", "report.html", "wandb", "hf", "*.lock", "*.lease", "ledger.jsonl", "energy.json", "log.txt",
    "samples", "profile", "evidence", "experiment.py",
)  # fmt: skip
"""Of the parent's folder: what is its own, or is written again"""


def branch(parent: str | Path, experiment: Experiment, runtime: Runtime) -> int:
    """Makes the run folder `runtime.workdir`, with the parent's newest checkpoint of a step before the two runs differ,
    and the parent's metrics up to there. `train` then goes on from it, bit for bit as if it had trained from step 0.
    Nothing is done if the folder is a run already.

    The parent differs from the experiment in this alone: where the experiment's view has a `Quantize`, it has
    `Identity()`, or a `Quantize` that had not begun either; it has another number of steps or another schedule, whose
    learning rates were the same up to there.

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
    start = min(_starts(experiment), default=experiment.steps)
    same = same_steps(before, experiment)
    last = min(start - 1, same)
    saved = [step for step in steps(run.folder / "checkpoints") if step <= last]
    if not saved:
        where = f"{start}, at which rounding begins" if start <= same else f"{same + 1}, at which learning rates differ"
        raise UserError(
            f"{parent} has no checkpoint of a step before {where}; train it with "
            f"--runtime.checkpoints.keep-every {max(1, last)}"
        )
    step = saved[-1]
    identified_by = run.identity_of(experiment)
    known = _compared(before, run.config["identity"], step)
    if changed := differences(known, _compared(experiment, identified_by, step)):
        raise UserError(f"{parent} cannot be the beginning of this run; it differs in {'; '.join(changed)}")
    begin(run, experiment, identified_by, step, runtime)
    return step


def begin(run: Parent, experiment: Experiment, identified_by: dict[str, Any], step: int, runtime: Runtime) -> None:
    """Makes the run folder `runtime.workdir` with the checkpoint of another run after `step`, and its records.

    Args:
        run: the other run.
        identified_by: the identity of `experiment`, with the same data and models.

    Raises:
        StorageError: the one cannot be read, or the other cannot be written.
    """
    source, target = run.folder, at(runtime.workdir)
    described = {
        **run.config,
        "fingerprint": fingerprint(identified_by),
        "identity": identified_by,
        "experiment": to_json(experiment),
        "runtime": to_json(runtime),
    }
    found = restore(source / "checkpoints", step, states_of(run.experiment).abstract)
    state = merged(experiment, found.state)
    rows = [row for row in read(source / "metrics.jsonl") if row["step"] <= step]
    part = target.with_name(f".{target.name}.branch")  # renamed when it is whole
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(*NOT_TAKEN))
        (part / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
        (part / "checkpoints").mkdir()
        with Checkpointer(part / "checkpoints", runtime.checkpoints) as writer:
            own = {k: v for k, v in found.extra.items() if k != "metrics"} | {"tracker": {}}  # the W&B run is another
            writer.save(step, state, own, found.extra.get("metrics", {}))
        ledger = Ledger(part / "ledger.jsonl")
        elapsed = rows[-1]["elapsed"] if rows else 0.0
        ledger.append("created", name=experiment.name, parent=str(source), step=step, elapsed=elapsed)
        runs.write_json(part / "config.json", described)
        part.rename(target)
    except OSError as error:
        raise StorageError(f"{target}: the run folder cannot be written ({error.strerror or error})") from error


def merged(experiment: Experiment, before: TrainState) -> TrainState:
    """The state of the experiment after the same steps: that of the run before, and for what only the experiment's view
    has (learned scales and their moments) the values of step 0, which have not changed."""
    states = states_of(experiment)
    fresh = states.given(stored.parts(jax.device_get(before.params))[0])
    old = tree.flatten(before)
    new = tree.flatten(fresh)
    if lost := set(old) - set(new):
        raise UserError(f"the state of the run before has parts that this run's does not have: {sorted(lost)[0]}")
    return tree.map_with_path(lambda path, x: old.get(path, x), fresh)


def possible(parent: str | Path, last: int) -> bool:
    """Whether a run has a checkpoint of a step up to `last`."""
    return any(step <= last for step in steps(Path(parent) / "checkpoints"))


def same_steps(one: Experiment, other: Experiment) -> int:
    """How many steps, from the first one, have the same learning rates in both."""
    many = np.arange(min(one.steps, other.steps), dtype=np.int32)
    rates = [np.broadcast_to(np.asarray(e.schedule.build(e.steps)(many)), many.shape) for e in (one, other)]
    different = np.flatnonzero(rates[0] != rates[1])
    return int(different[0]) if len(different) else len(many)


def _starts(experiment: Experiment) -> list[int]:
    """The steps at which the views of quantization begin."""
    return [view.start or 0 for view in quantizes(experiment.view.over(experiment.steps))]


def _compared(experiment: Experiment, identified_by: dict[str, Any], step: int) -> dict[str, Any]:
    """The identity of the run up to a step: a `Quantize` that begins later is no part of it."""
    view = to_json(_unrounded(experiment.view.over(experiment.steps), step))
    return {**identified_by, "view": view, "steps": None, "schedule": None}


def _unrounded(value: Any, step: int) -> Any:
    if isinstance(value, Quantize):
        return Identity() if (value.start or 0) > step else value
    if isinstance(value, tuple):
        return tuple(_unrounded(part, step) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _unrounded(getattr(value, f.name), step) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value
