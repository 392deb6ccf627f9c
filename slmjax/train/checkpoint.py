"""Checkpoints of a run: asynchronous, atomic, checksummed; a damaged one is set aside and the one before it used.

Their format on disk: `checkpoint_folder`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from slmjax.errors import UserError
from slmjax.train import checkpoint_folder
from slmjax.train.checkpoint_folder import Checksummed, Items, Restored, beside, steps, storage
from slmjax.train.lock import OPEN, Fence, lock
from slmjax.train.processes import of_the_first
from slmjax.types import TrainState


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save and what to keep. The last step is always saved."""

    every: int = 1000
    """Steps between saves; 0 saves by `seconds` and at the end only"""
    seconds: float = 1800
    """Wall-clock seconds between saves at most; 0 for none"""
    keep_last: int = 3
    """How many of the newest checkpoints are kept"""
    keep_every: int = 0
    """Steps that are multiples of this are saved and kept forever; 0 for none"""
    keep_steps: tuple[int, ...] = ()
    """Further steps that are saved and kept forever. A run whose learning rate falls from a plateau (WSD) adds the last
    step before, from which `--extend` goes on"""
    best: str = ""
    """Name of a metric to minimise (`validation/loss`): the step with its least value is saved and kept as well; empty
    for none"""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("seconds", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"checkpoints.{name} is {getattr(self, name)}; expected at least {least}")

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved because of its number alone, `every`, `keep_every` or `keep_steps`."""
        return step in self.keep_steps or any(n > 0 and step % n == 0 for n in (self.every, self.keep_every))

    def kept(self, saved: Sequence[int], score: Callable[[int], float]) -> set[int]:
        """Which of the saved steps (oldest first) to keep. `score`: `best` of a step; infinite if unknown."""
        kept = {*saved[-self.keep_last :], *(step for step in saved if step in self.keep_steps)}
        kept |= {step for step in saved if self.keep_every and step % self.keep_every == 0}
        if self.best:
            scores = {step: score(step) for step in saved}
            kept |= {step for step, x in scores.items() if x == min(scores.values()) < math.inf}
        return kept


class Checkpointer:
    """Saves and restores the checkpoints of one run. A context manager: inside it no other run can use the folder."""

    def __init__(
        self,
        folder: Path,
        policy: Checkpoints,
        say: Callable[[str], None] = print,
        fence: Fence = OPEN,
    ):
        self.folder = folder.absolute()
        self.policy = policy
        self.say = say
        self.fence = fence
        self._saved = False  # since old checkpoints were last removed

    def __enter__(self) -> Checkpointer:
        """
        Raises:
            Locked: another run holds the folder.
        """
        with contextlib.ExitStack() as stack, storage(self.folder, "open"):
            if jax.process_index() == 0:
                stack.enter_context(lock(self.folder))
                checkpoint_folder.remove_leftovers(self.folder)
            self._writer = ocp.AsyncCheckpointer(Checksummed(self.fence))
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held, contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            if kind is None or jax.process_count() == 1:  # else it would wait for processes that may have died
                with storage(self.folder, "finish a save"), contextlib.closing(self._writer):
                    self.wait()

    def save(self, step: int, state: TrainState, extra: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Copies the state to the host and returns; a thread writes it. Does nothing if the step is saved already.

        Raises:
            StorageError: this save, or the one before it, failed. Earlier checkpoints are intact.
            Superseded: a later attempt has the run.
        """
        self.wait()
        self.fence.check(now=True)
        if of_the_first(step in steps(self.folder)):
            return
        with storage(self.folder, f"save step {step}"):
            self._saved = True
            self._writer.save(
                self.folder / str(step),
                args=Items(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave(beside(state)),
                    extra=ocp.args.JsonSave({**extra, "metrics": dict(metrics)}),
                ),
            )

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether `policy.best` is lower in these metrics than in every checkpoint. The first process decides for all:
        the others may not yet see the files that it wrote, and all of them must take part in a save."""
        name = self.policy.best
        if name not in metrics:
            return False
        first = jax.process_index() == 0
        return of_the_first(first and all(metrics[name] < _score(self.folder, s, name) for s in steps(self.folder)))

    def check(self) -> None:
        """Raises StorageError if a save in the background has failed."""
        with storage(self.folder, "save"):
            self._writer.check_for_errors()

    def wait(self) -> None:
        """Returns once the save in progress is on disk; then removes the checkpoints that the policy does not keep.

        Raises:
            StorageError: the save failed.
        """
        with storage(self.folder, "save"):
            self._writer.wait_until_finished()
        if self._saved and jax.process_index() == 0:
            self.fence.check(now=True)
            saved = steps(self.folder)
            kept = self.policy.kept(saved, lambda step: _score(self.folder, step, self.policy.best))
            with storage(self.folder, "remove an old checkpoint"):
                for step in set(saved) - kept:
                    checkpoint_folder.remove(self.folder, step)
        self._saved = False

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint whose checksums match, or None if there is none.

        A checkpoint with a missing, truncated or changed file is renamed to `bad-<step>`, and the one before is tried.

        Args:
            abstract: ShapeDtypeStructs with shardings, of any mesh.

        Raises:
            StorageError: the checksums match, but the checkpoint is of another model or optimizer.
        """
        self.wait()
        self.fence.check(now=True)
        step = self._newest_good()
        if step is None:
            return None
        return checkpoint_folder.restore(self.folder, step, abstract)

    def _newest_good(self) -> int | None:
        """The newest undamaged step: the first process checks the files, the others get its result."""

        def damaged(step: int, wrong: list[str]) -> None:
            aside = _set_aside(self.folder, step)
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            older = bool(steps(self.folder))
            then = "trying the one before" if older else "no other is left: training starts over from step 0"
            self.say(f"checkpoint {step} is damaged: {wrong[0]}{more}; renamed to {aside}, {then}")

        first = jax.process_index() == 0
        return of_the_first(checkpoint_folder.newest_good(self.folder, damaged) if first else None)


def _set_aside(folder: Path, step: int) -> str:
    names = (f"bad-{step}" + (f"-{i}" if i > 1 else "") for i in range(1, 1000))
    name = next(n for n in names if not (folder / n).exists())
    (folder / str(step)).rename(folder / name)
    return name


def _score(folder: Path, step: int, metric: str) -> float:
    """A metric in the files of a checkpoint; infinite if it is not there (a save in progress), or is NaN."""
    score = checkpoint_folder.extra(folder, step).get("metrics", {}).get(metric, math.inf)
    return score if math.isfinite(score) else math.inf  # NaN would be neither less nor more than the others
