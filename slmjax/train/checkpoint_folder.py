"""A folder of checkpoints, by itself: what lies in it, and how a state or parameters are read and written.

A folder `<step>/` holds three items: `params`, `train` (step, optimizer, view) and `extra` (JSON: data position,
tracker, rollbacks), and `SHA256SUMS`. Orbax writes them under another name; once the sums are written and synced, one
rename makes it a checkpoint. A process killed before leaves the older checkpoints and a leftover that the next run
removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from slmjax.errors import StorageError, UserError
from slmjax.train import manifest
from slmjax.types import Params, TrainState

# Orbax logs what it raises, from each of its threads with a traceback: hundreds of lines before the one that `storage`
# makes of it.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: TrainState
    extra: dict[str, Any]


AT_ONCE = 1 << 27
"""Bytes that `save_params` has waiting to be written"""


class Checksummed(atomicity.AtomicRenameTemporaryPath):
    """The folder of a save in flight. `finalize` is its commit, called on the first process when all have written."""

    async def finalize(self) -> None:
        folder = Path(self.get())
        if folder.name.split(".")[0].isdigit():  # a step; its items pass here as well
            await asyncio.to_thread(manifest.write, folder)
        await super().finalize()


def steps(folder: Path) -> list[int]:
    """The steps that have a committed checkpoint, oldest first."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


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
    """One checkpoint as it lies there, unverified, into the shapes and shardings of `abstract`."""
    at = folder.absolute() / str(step)
    with storage(folder, f"restore step {step}"), _reader() as reader:
        params = reader.restore(at / "params", args=ocp.args.StandardRestore(abstract.params))
        train = reader.restore(at / "train", args=ocp.args.StandardRestore(beside(abstract)))
        return Restored(step, TrainState(params=params, **train), extra(folder, step))


def restore_params(folder: Path, step: int | None = None, abstract: Params | None = None) -> Params:
    """The stored parameters alone, after a check of their sums.

    Args:
        folder: holds `<step>/params`; the latest step by default.
        abstract: ShapeDtypeStructs with shardings; without it, whole arrays on the first device.

    Raises:
        StorageError: no such checkpoint, or a damaged one.
    """
    step = latest_step(folder) if step is None else step
    at = folder.absolute() / str(step)
    if step is None or not at.is_dir():
        there = ", ".join(map(str, steps(folder))) or "none"
        raise StorageError(f"{folder}: no checkpoint of step {step}; there are: {there}")
    if wrong := manifest.problems(at):
        raise StorageError(f"{at} is damaged: {wrong[0]}; choose another step of: {', '.join(map(str, steps(folder)))}")
    with storage(folder, f"restore step {step}"), _reader() as reader:
        wanted = abstract or _whole(at / "params")
        return reader.restore(at / "params", args=ocp.args.StandardRestore(wanted))


def save_params(folder: Path, params: Params, extra: dict[str, Any], step: int = 0) -> None:
    """A checkpoint of parameters alone (an import), as atomic and as checksummed as any.

    What waits to be written is bounded, so that a large model is not held twice (of arrays on a device; numpy arrays
    are copied first).
    """
    most = max([AT_ONCE, *(x.nbytes for x in jax.tree.leaves(params))])
    bound: Any = 1.05 * most / 1e9  # the library counts in (any) gigabytes, and refuses an array that exceeds them
    handlers: dict[str, Any] = {
        "params": ocp.StandardCheckpointHandler(save_concurrent_gb=bound),
        "extra": ocp.JsonCheckpointHandler(),
    }
    with storage(folder, f"save step {step}"):
        manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(temporary_path_class=Checksummed),
            item_handlers=handlers,
        )
        with contextlib.closing(manager):
            items = {"params": ocp.args.StandardSave(params), "extra": ocp.args.JsonSave(extra)}
            manager.save(step, args=ocp.args.Composite(**items))


def beside(state: TrainState) -> dict[str, Any]:
    """What is saved besides the parameters."""
    return {"step": state.step, "opt": state.opt, "view": state.view}


def _whole(at: Path) -> Params:
    """Abstract arrays as the files describe them, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    described = ocp.StandardCheckpointHandler().metadata(epath.Path(at))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), described.tree)


@contextlib.contextmanager
def _reader() -> Iterator[ocp.Checkpointer]:
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as reader:
        yield reader


@contextlib.contextmanager
def storage(folder: Path, doing: str) -> Iterator[None]:
    """Whatever the file system or Orbax raises -> one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0][:300]
        full = "No space" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        hint = "; free some space and run the same command again" if full else ""
        raise StorageError(f"{folder}: cannot {doing}: {said}; earlier checkpoints are intact{hint}") from error
