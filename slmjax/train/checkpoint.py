"""Checkpoints: asynchronous, atomic, checksummed; a bad one is set aside and the previous good one used.

A folder `checkpoints/<step>/` holds three items: `params`, `train` (step, optimizer, view) and `extra` (JSON: data
position, tracker, rollbacks), and `SHA256SUMS`. Orbax writes them under another name; once the sums are written and
synced, one rename makes it a checkpoint. A process killed before leaves the older checkpoints and a leftover that the
next run removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.path import atomicity

from slmjax.errors import StorageError, UserError
from slmjax.train import manifest
from slmjax.train.lock import lock
from slmjax.types import Params, TrainState


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save and what to keep. The last step is always saved."""

    every: int = 1000
    """Steps between saves; 0 saves by `seconds` and at the end only"""
    seconds: float = 1800
    """Wall-clock seconds between saves at most; 0 for none"""
    keep_last: int = 3
    """The newest ones kept"""
    keep_every: int = 0
    """Steps that are multiples of this are kept forever; 0 for none"""
    best: str = ""
    """A metric, less is better (`validation/loss`): the best one is saved and kept as well; empty for none"""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("seconds", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"checkpoints.{name} is {getattr(self, name)}; expected at least {least}")


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: TrainState
    extra: dict[str, Any]


AT_ONCE = 1 << 27


class _Checksummed(atomicity.AtomicRenameTemporaryPath):
    """The folder of a save in flight. `finalize` is its commit, called on the first process when all have written."""

    async def finalize(self) -> None:
        folder = Path(self.get())
        if folder.name.split(".")[0].isdigit():  # a step; its items pass here as well
            await asyncio.to_thread(manifest.write, folder)
        await super().finalize()


class Checkpointer:
    """Saves and restores the checkpoints of one run, whose folder it holds while it is entered."""

    def __init__(self, folder: Path, policy: Checkpoints, say: Callable[[str], None] = print):
        self.folder = folder.absolute()
        self.policy = policy
        self.say = say

    def __enter__(self) -> Checkpointer:
        """
        Raises:
            Locked: another run holds the folder.
        """
        with contextlib.ExitStack() as stack, _storage(self.folder, "open"):
            if jax.process_index() == 0:
                stack.enter_context(lock(self.folder))
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                        list(_preserved(self.folder, self.policy))
                    ),
                    cleanup_tmp_directories=True,
                    temporary_path_class=_Checksummed,
                ),
                item_names=("params", "train", "extra"),
            )
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held, _storage(self.folder, "finish a save") if kind is None else contextlib.suppress(Exception):
            if kind is None or jax.process_count() == 1:  # else it would wait for processes that may have died
                self.manager.close()

    def save(self, step: int, state: TrainState, extra: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Copies the state to the host and returns; writing goes on meanwhile. Does nothing if the step is there.

        Raises:
            StorageError: this save, or the one before it, failed. Earlier checkpoints are intact.
        """
        with _storage(self.folder, f"save step {step}"):
            if step in self.manager.all_steps():
                return
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave(_train(state)),
                    extra=ocp.args.JsonSave({**extra, "metrics": dict(metrics)}),
                ),
            )

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics beat every checkpoint by `policy.best`."""
        if self.policy.best not in metrics:
            return False
        return all(metrics[self.policy.best] < _score(self.folder, s, self.policy.best) for s in steps(self.folder))

    def check(self) -> None:
        """Raises StorageError if a save in the background has failed."""
        with _storage(self.folder, "save"):
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Until the save in flight is on disk. Raises StorageError if it failed."""
        with _storage(self.folder, "save"):
            self.manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint whose every byte is as written, or None if there is none.

        A checkpoint with a missing, truncated or changed file is renamed to `bad-<step>`, and the one before is tried.

        Args:
            abstract: ShapeDtypeStructs with shardings, of any mesh.

        Raises:
            StorageError: the bytes are as written, but are of another model or optimizer.
        """
        self.wait()
        step = self._newest_good()
        if step is None:
            return None
        return restore(self.folder, step, abstract)

    def _newest_good(self) -> int | None:
        """The first process reads and judges the files; the others are told."""
        found = -1
        if jax.process_index() == 0:
            for step in reversed(steps(self.folder)):
                wrong = manifest.problems(self.folder / str(step))
                if not wrong:
                    found = step
                    break
                aside = _set_aside(self.folder, step)
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                self.say(f"checkpoint {step} is damaged: {wrong[0]}{more}; moved to {aside}, trying the one before")
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self.manager.reload()
        return None if found < 0 else found


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
    with _storage(folder, f"restore step {step}"), _reader() as reader:
        params = reader.restore(at / "params", args=ocp.args.StandardRestore(abstract.params))
        train = reader.restore(at / "train", args=ocp.args.StandardRestore(_train(abstract)))
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
    with _storage(folder, f"restore step {step}"), _reader() as reader:
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
    with _storage(folder, f"save step {step}"):
        manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(temporary_path_class=_Checksummed),
            item_handlers=handlers,
        )
        with contextlib.closing(manager):
            items = {"params": ocp.args.StandardSave(params), "extra": ocp.args.JsonSave(extra)}
            manager.save(step, args=ocp.args.Composite(**items))


def _train(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt": state.opt, "view": state.view}


def _whole(at: Path) -> Params:
    """Abstract arrays as the files describe them, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    described = ocp.StandardCheckpointHandler().metadata(epath.Path(at))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), described.tree)


def _set_aside(folder: Path, step: int) -> str:
    names = (f"bad-{step}" + (f"-{i}" if i > 1 else "") for i in range(1, 1000))
    name = next(n for n in names if not (folder / n).exists())
    (folder / str(step)).rename(folder / name)
    return name


def _score(folder: Path, step: int, metric: str) -> float:
    """A metric as a checkpoint on disk holds it (one in flight does not yet), infinite if it does not."""
    return extra(folder, step).get("metrics", {}).get(metric, float("inf"))


@dataclass(frozen=True)
class _Best:
    """The checkpoint with the least metric. Orbax's own forgets the metrics when a run is resumed."""

    folder: Path
    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        scores = [_score(self.folder, c.step, self.metric) for c in checkpoints]
        return [score == min(scores) < float("inf") for score in scores]


def _preserved(folder: Path, policy: Checkpoints) -> Iterator[Any]:
    yield checkpoint_managers.LatestN(policy.keep_last)
    if policy.keep_every:
        yield checkpoint_managers.EveryNSteps(policy.keep_every)
    if policy.best:
        yield _Best(folder, policy.best)


@contextlib.contextmanager
def _reader() -> Iterator[ocp.Checkpointer]:
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as reader:
        yield reader


@contextlib.contextmanager
def _storage(folder: Path, doing: str) -> Iterator[None]:
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
