"""A run's folder: made once, and continued only by the same experiment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax import __version__
from slmjax.config import Experiment, Runtime, identity
from slmjax.data.spec import Store
from slmjax.errors import StorageError, UserError
from slmjax.experiment_file import load_config
from slmjax.files import write_text
from slmjax.runs.rates import jump
from slmjax.serialise import differences, fingerprint, from_json, to_json
from slmjax.train.checkpoint_folder import latest_step
from slmjax.train.lock import FILES as LOCK
from slmjax.train.lock import Fence, lock

STARTED = (
    "config.json",
    "experiment.py",
    "compute.json",
    "cost.json",
    "generation_config.json",
    "ledger.jsonl",
    "metrics.jsonl",
)
"""Of a run folder: what belongs to one experiment before its first checkpoint"""


def describe(
    experiment: Experiment,
    runtime: Runtime,
    stores: Sequence[Store],
    start: str | None = None,
    models: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of config.json. `stores`: of the opened data. `start`: the content hash of the parameters that the
    run starts from, if they are given. `models`: those of the models that its objective reads."""
    identified_by = identity(experiment, [store.fingerprint for store in stores], start, models)
    return {
        "format": 1,
        "slmjax": __version__,
        "fingerprint": fingerprint(identified_by),
        "identity": identified_by,
        "stores": [dataclasses.asdict(store) for store in stores],
        "experiment": to_json(experiment),
        **({"models": dict(models)} if models else {}),
        "runtime": to_json(runtime),
    }


def check(path: Path, config: dict[str, Any], *, accept_changes: bool) -> list[str]:
    """Checks that the run folder is free, or belongs to this experiment and the same data. Writes nothing.

    Returns:
        The fields that differ from those that the run began with: none, unless `accept_changes`.

    Raises:
        UserError: the folder exists and is not a run folder, or holds a run of another experiment.
    """
    file = path / "config.json"
    if file.is_file():
        changed = differences(load_config(file)["identity"], config["identity"])
        if changed and not begun(path):
            return []  # a start of another experiment that never made a step: the folder is free
        if changed:
            changed += _changes(path, load_config(file), config, changed, accept_changes=accept_changes)
        return changed
    if path.exists() and (not path.is_dir() or any(p.name not in LOCK for p in path.iterdir())):
        raise UserError(f"{path} exists and is not a run folder (no config.json); choose another --runtime.workdir")
    return []


def _changes(
    path: Path, old: dict[str, Any], new: dict[str, Any], changed: Sequence[str], *, accept_changes: bool
) -> list[str]:
    """What a change of the experiment does to the run besides: how its learning rate would jump.

    Raises:
        UserError: the changes are not accepted, or no step is left in which anything could differ.
    """
    done = latest_step(path / "checkpoints") or 0
    after: Experiment = from_json(new["experiment"])
    try:
        before: Experiment = from_json(old["experiment"])
    except UserError:  # another version of slmjax wrote it: what it computed is not known
        before = after
    over = done > 0 and after.steps <= done
    if over and accept_changes:
        raise UserError(
            f"{path} has made {done} steps; with steps = {after.steps} none is left in which anything could differ "
            f"({'; '.join(changed)}). Choose another --runtime.workdir"
        )
    said = jump(before, after, done)
    if accept_changes:
        return [said] if said else []
    anyway = "" if over else ", or continue it all the same with --runtime.overwrite-changed"
    if said and done == before.steps:
        more = f"slmjax train {shlex.quote(str(path))} --extend {after.steps - before.steps}"
        said += f". To go on from before the learning rate fell: {more}"
    raise UserError(
        f"{path} holds a run of another experiment; it differs in {'; '.join(changed)}. Choose another "
        f"--runtime.workdir{anyway}{f': {said}' if said else ''}"
    )


def begun(path: Path) -> bool:
    """Whether a run has made a step in this folder: it has a checkpoint, or has logged one."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    saved = checkpoints.is_dir() and any(p.is_dir() for p in checkpoints.iterdir())
    return saved or (metrics.is_file() and metrics.stat().st_size > 0)


@contextlib.contextmanager
def held(path: Path, config: dict[str, Any]) -> Iterator[Fence]:
    """A context manager: no other run works in the folder. What a start of another experiment left that never made a
    step is removed; and the folder, if nothing is written into it.

    Raises:
        Locked: another process is at work there.
        StorageError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    with lock(path) as fence:
        file = path / "config.json"
        if file.is_file() and not begun(path) and load_config(file)["identity"] != config["identity"]:
            for name in STARTED:
                (path / name).unlink(missing_ok=True)
        try:
            yield fence
        finally:  # while it is locked: another process may hold the lock as soon as this one does not
            with contextlib.suppress(OSError):
                if all(p.name in LOCK for p in path.iterdir()):
                    shutil.rmtree(path)


def claim(path: Path, config: dict[str, Any], source: Path | None) -> None:
    """Makes the folder that of a run: called when all that can be refused before the first step has been checked.

    Args:
        source: the Python file of the experiment, which is copied.

    Raises:
        StorageError: it cannot be written.
    """
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        new = not file.is_file()
        if new or load_config(file)["identity"] != config["identity"]:
            write_json(file, config)
        if new and source is not None:
            shutil.copyfile(source, path / "experiment.py")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: the run folder cannot be written ({error.strerror}); free or choose a disk")


def write_json(file: Path, data: Any) -> None:
    """Atomically: a crash leaves the old file or the new one.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(file, json.dumps(data, indent=1) + "\n")
