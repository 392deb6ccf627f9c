"""A run's folder: made once, and continued only by the same experiment."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax import __version__
from slmjax.config import Experiment, Runtime, identity
from slmjax.data.spec import Store
from slmjax.errors import StorageError, UserError
from slmjax.experiment_file import load_config
from slmjax.serialise import differences, fingerprint, to_json


def describe(
    experiment: Experiment, runtime: Runtime, stores: Sequence[Store], start: str | None = None
) -> dict[str, Any]:
    """The content of config.json. `stores`: of the opened data. `start`: the content hash of the parameters that the
    run starts from, if they are given."""
    identified_by = identity(experiment, [store.fingerprint for store in stores], start)
    return {
        "format": 1,
        "slmjax": __version__,
        "fingerprint": fingerprint(identified_by),
        "identity": identified_by,
        "stores": [dataclasses.asdict(store) for store in stores],
        "experiment": to_json(experiment),
        "runtime": to_json(runtime),
    }


def open_folder(path: Path, config: dict[str, Any], source: Path | None, *, accept_changes: bool) -> list[str]:
    """Makes the run folder, or checks that it belongs to this experiment and the same data.

    Returns:
        The fields that differ from those that the run began with: none, unless `accept_changes`.

    Raises:
        UserError: the folder exists and is not a run folder, or holds a run of another experiment.
        StorageError: it cannot be written.
    """
    file = path / "config.json"
    if file.is_file():
        changed = differences(load_config(file)["identity"], config["identity"])
        if changed and not accept_changes:
            raise UserError(
                f"{path} holds a run of another experiment; it differs in {'; '.join(changed)}. Choose another "
                "--runtime.workdir, or continue it all the same with --runtime.overwrite-changed"
            )
        if changed:
            write_json(file, config)
        return changed
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not a run folder (no config.json); choose another --runtime.workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if source is not None:
            shutil.copyfile(source, path / "experiment.py")
        write_json(file, config)
    except OSError as error:
        raise StorageError(
            f"{path}: the run folder cannot be written ({error.strerror}); free or choose a disk"
        ) from error
    return []


def write_json(file: Path, data: Any) -> None:
    """Atomically: a crash leaves the old file or the new one."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(file)
