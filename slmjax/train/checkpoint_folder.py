"""A folder of checkpoints: its files, and how a training state or parameters are read and written.

A folder `<step>/` holds three items: `params`, `train` (step, optimizer, view) and `extra` (JSON: data position,
tracker, rollbacks), and `SHA256SUMS`. Orbax writes them into `<step>.<something>`; once the checksums are written and
synced, one rename makes it a checkpoint. A process killed before that leaves the older checkpoints as they are, and
that folder, which the next run removes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from slmjax.errors import StorageError
from slmjax.train import manifest
from slmjax.train.lock import OPEN, Fence
from slmjax.types import Params, TrainState

# Orbax also logs the errors that it raises, from each of its threads with a traceback: hundreds of lines before the one
# line of `storage`.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    step: int
    state: TrainState
    extra: dict[str, Any]


# TensorStore raises a ValueError that starts with the name of its status.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")

AT_ONCE = 1 << 27
"""Bytes that `save_params` keeps in memory for writing, at most (one array at least)"""


class Checksummed(ocp.CompositeCheckpointHandler):
    """Writes the items of a step, and then their checksums.

    Orbax calls `finalize` on the first process, after every process has written and before the rename.
    """

    def __init__(self, fence: Fence = OPEN, **handlers: Any):
        super().__init__(**handlers)
        self._fence = fence

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        manifest.write(Path(directory))
        self._fence.check(now=True)


@ocp.args.register_with_handler(Checksummed, for_save=True, for_restore=True)
class Items(ocp.args.Composite):
    """The arguments of a save by `Checksummed`: {item: arguments}."""


def steps(folder: Path) -> list[int]:
    """The steps that have a committed checkpoint, oldest first."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def newest_good(folder: Path, damaged: Callable[[int, list[str]], None]) -> int | None:
    """The newest step whose checksums match; None if there is none.

    Args:
        damaged: called for each damaged step, newest first, with the step and its problems, one line a file.
    """
    for step in reversed(steps(folder)):
        wrong = manifest.problems(folder / str(step))
        if not wrong:
            return step
        damaged(step, wrong)
    return None


def remove(folder: Path, step: int) -> None:
    """Deletes a checkpoint. If the process is killed meanwhile, a folder `<step>.removed` is left, never a part of a
    checkpoint under its own name."""
    (folder / str(step)).rename(folder / f"{step}.removed")
    shutil.rmtree(folder / f"{step}.removed")


def remove_leftovers(folder: Path) -> None:
    """Deletes the folders of saves and removals that were interrupted."""
    for path in folder.iterdir():
        step, dot, _ = path.name.partition(".")
        if dot and step.isdigit() and path.is_dir():
            shutil.rmtree(path)


def latest_step(folder: Path) -> int | None:
    return max(steps(folder), default=None)


def extra(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The JSON of a checkpoint (of the latest one by default); empty if there is none or it cannot be read."""
    step = latest_step(folder) if step is None else step
    try:
        return json.loads((folder / str(step) / "extra" / "metadata").read_text())
    except (OSError, ValueError):
        return {}


def restore(folder: Path, step: int, abstract: TrainState) -> Restored:
    """One checkpoint, without checking its checksums, with the shapes and shardings of `abstract`."""
    at = folder.absolute() / str(step)
    with _reader(folder, step) as reader:
        params = reader.restore(at / "params", args=ocp.args.StandardRestore(abstract.params))
        train = reader.restore(at / "train", args=ocp.args.StandardRestore(beside(abstract)))
        return Restored(step, TrainState(params=params, **train), extra(folder, step))


def restore_params(folder: Path, step: int | None = None, abstract: Params | None = None) -> Params:
    """The stored parameters alone, after checking the checksums.

    Args:
        folder: holds `<step>/params`; the latest step by default.
        abstract: ShapeDtypeStructs with shardings; without it, whole arrays on the first device.

    Raises:
        StorageError: no such checkpoint, or a damaged one.
    """
    step = latest_step(folder) if step is None else step
    at = folder.absolute() / str(step)
    if step is None or not at.is_dir():
        saved = ", ".join(map(str, steps(folder))) or "none"
        raise StorageError(f"{folder}: no checkpoint of step {step}; there are: {saved}")
    if wrong := manifest.problems(at):
        raise StorageError(f"{at} is damaged: {wrong[0]}; choose another step of: {', '.join(map(str, steps(folder)))}")
    with _reader(folder, step) as reader:
        wanted = abstract or _whole(at / "params")
        return reader.restore(at / "params", args=ocp.args.StandardRestore(wanted))


def save_params(folder: Path, params: Params, extra: dict[str, Any], step: int = 0) -> None:
    """A checkpoint of parameters alone (an import), atomic and checksummed like any other.

    The bytes in memory for writing are bounded, so that no second copy of a large model is held (this is so for arrays
    on a device; numpy arrays are copied first).
    """
    most = max([AT_ONCE, *(x.nbytes for x in jax.tree.leaves(params))])
    bound: Any = 1.05 * most / 1e9  # the library counts in (any) gigabytes, and refuses an array that exceeds them
    params_handler = ocp.StandardCheckpointHandler(save_concurrent_gb=bound)
    handler = Checksummed(params=params_handler, extra=ocp.JsonCheckpointHandler())
    items = Items(params=ocp.args.StandardSave(params), extra=ocp.args.JsonSave(extra))
    with storage(folder, f"save step {step}"), contextlib.closing(ocp.Checkpointer(handler)) as writer:
        writer.save(folder.absolute() / str(step), args=items)


def beside(state: TrainState) -> dict[str, Any]:
    """What is saved besides the parameters."""
    return {"step": state.step, "opt": state.opt, "view": state.view}


def _whole(at: Path) -> Params:
    """Abstract arrays as the files describe them, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    described = ocp.StandardCheckpointHandler().metadata(epath.Path(at))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), described.tree)


@contextlib.contextmanager
def _reader(folder: Path, step: int) -> Iterator[ocp.Checkpointer]:
    """Reads a step; arrays with other names or shapes (a ValueError of Orbax) are a StorageError as well."""
    doing = f"restore step {step}"
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as reader:
        try:
            with storage(folder, doing):
                yield reader
        except ValueError as error:
            raise _failed(folder, doing, error) from error


@contextlib.contextmanager
def storage(folder: Path, doing: str) -> Iterator[None]:
    """Turns errors of the file system and of TensorStore into a one-line StorageError; others pass unchanged.

    Args:
        doing: what failed, for the message "cannot ...".
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _STATUS.match(str(error)):
            raise
        raise _failed(folder, doing, error) from error


def _failed(folder: Path, doing: str, error: Exception) -> StorageError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:300]
    full = "No space" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
    hint = "; free some space and run the same command again" if full else ""
    return StorageError(f"{folder}: cannot {doing}: {reason}; earlier checkpoints are intact{hint}")
