"""Checkpoints of a run: asynchronous, atomic, checksummed; a bad one is set aside and the previous good one used.

How they lie on disk: `checkpoint_folder`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from slmjax.errors import UserError
from slmjax.train import checkpoint_folder, manifest
from slmjax.train.checkpoint_folder import Checksummed, Restored, beside, steps, storage
from slmjax.train.lock import lock
from slmjax.types import TrainState


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
    """Steps that are multiples of this are saved and kept forever; 0 for none"""
    best: str = ""
    """A metric, less is better (`validation/loss`): the best one is saved and kept as well; empty for none"""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("seconds", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"checkpoints.{name} is {getattr(self, name)}; expected at least {least}")

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved, whatever the clock and the metrics say."""
        return any(n > 0 and step % n == 0 for n in (self.every, self.keep_every))


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
        with contextlib.ExitStack() as stack, storage(self.folder, "open"):
            if jax.process_index() == 0:
                stack.enter_context(lock(self.folder))
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                        list(_preserved(self.folder, self.policy))
                    ),
                    cleanup_tmp_directories=True,
                    temporary_path_class=Checksummed,
                ),
                item_names=("params", "train", "extra"),
            )
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held, storage(self.folder, "finish a save") if kind is None else contextlib.suppress(Exception):
            if kind is None or jax.process_count() == 1:  # else it would wait for processes that may have died
                self.manager.close()

    def save(self, step: int, state: TrainState, extra: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Copies the state to the host and returns; writing goes on meanwhile. Does nothing if the step is there.

        Raises:
            StorageError: this save, or the one before it, failed. Earlier checkpoints are intact.
        """
        with storage(self.folder, f"save step {step}"):
            if step in self.manager.all_steps():
                return
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave(beside(state)),
                    extra=ocp.args.JsonSave({**extra, "metrics": dict(metrics)}),
                ),
            )

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics beat every checkpoint by `policy.best`. The first process looks; the others are told,
        since they may not see yet what it has written, and a save takes all of them."""
        name = self.policy.best
        if name not in metrics:
            return False
        first = jax.process_index() == 0
        answer = first and all(metrics[name] < _score(self.folder, step, name) for step in steps(self.folder))
        return bool(_of_the_first(int(answer)))

    def check(self) -> None:
        """Raises StorageError if a save in the background has failed."""
        with storage(self.folder, "save"):
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Until the save in flight is on disk. Raises StorageError if it failed."""
        with storage(self.folder, "save"):
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
        return checkpoint_folder.restore(self.folder, step, abstract)

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
                older = bool(steps(self.folder))
                then = "trying the one before" if older else "no other is left: training starts over from step 0"
                self.say(f"checkpoint {step} is damaged: {wrong[0]}{more}; moved to {aside}, {then}")
        found = _of_the_first(found)
        self.manager.reload()
        return None if found < 0 else found


def _of_the_first(number: int) -> int:
    """The number that the first process gives, in all of them."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _set_aside(folder: Path, step: int) -> str:
    names = (f"bad-{step}" + (f"-{i}" if i > 1 else "") for i in range(1, 1000))
    name = next(n for n in names if not (folder / n).exists())
    (folder / str(step)).rename(folder / name)
    return name


def _score(folder: Path, step: int, metric: str) -> float:
    """A metric as a checkpoint on disk holds it (one in flight does not yet); infinite if it does not, or is NaN."""
    score = checkpoint_folder.extra(folder, step).get("metrics", {}).get(metric, math.inf)
    return score if math.isfinite(score) else math.inf  # NaN would be neither less nor more than the others


@dataclass(frozen=True)
class _Best:
    """The checkpoint with the least metric. Orbax's own forgets the metrics when a run is resumed."""

    folder: Path
    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        scores = [_score(self.folder, c.step, self.metric) for c in checkpoints]
        return [score == min(scores) < math.inf for score in scores]


def _preserved(folder: Path, policy: Checkpoints) -> Iterator[Any]:
    yield checkpoint_managers.LatestN(policy.keep_last)
    if policy.keep_every:
        yield checkpoint_managers.EveryNSteps(policy.keep_every)
    if policy.best:
        yield _Best(folder, policy.best)
