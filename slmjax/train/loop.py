"""The training loop: it feeds batches to the step, and reads the metrics of each step while the device computes the
next. Hooks, guard and checkpoint policy decide everything else."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from slmjax.errors import Diverged, Preempted
from slmjax.lease import Superseded
from slmjax.train.advance import Alone, Held, Measured, Steps
from slmjax.train.checkpoint import Checkpointer, Checkpoints
from slmjax.train.consensus import make_consensus, read
from slmjax.train.guard import Guard, Then
from slmjax.train.hooks import At, Hook, Silent, Tracker, silent
from slmjax.train.lock import OPEN, Fence, Locked
from slmjax.train.signals import Signals
from slmjax.train.step import Program
from slmjax.types import Batch, BatchStream, Frozen, TrainState

CLOCK = ("step_seconds", "tokens_per_second", "mfu", "memory_bytes")
"""Metrics that depend on the machine; an interrupted and resumed run repeats all others bit for bit"""

FASTER = 3
"""Rows that exceed the peak before it is taken to be wrong: one alone may be a clock's error"""


class Speed(NamedTuple):
    """The figures that turn tokens a second into model-FLOPs utilisation."""

    flops_per_token: float
    """Training FLOPs (forward and backward)"""
    peak_flops: float
    """FLOP/s of all devices together, measured or published"""


class Pending(NamedTuple):
    """A step that the device may still be computing."""

    step: int
    batch: Batch
    position: dict[str, Any]
    """Position of the data stream after this batch"""
    metrics: Measured
    agreed: Any
    """Sums over all processes, see `consensus`"""
    done: float | None
    """Monotonic seconds, if the step was complete right after its dispatch (small steps on a CPU); else None"""


class Settled(NamedTuple):
    """A step whose metrics have been read."""

    metrics: dict[str, float]
    then: Then
    stop: bool
    save: bool


def train(
    program: Program,
    *,
    data: BatchStream,
    steps: int,
    workdir: Path,
    tracker: Tracker,
    guard: Guard,
    checkpoints: Checkpoints,
    hooks: Sequence[Hook] = (),
    frozen: Frozen = (),
    speed: Speed | None = None,
    log_every: int = 1,
    say: Callable[[str], None] = print,
    fence: Fence = OPEN,
) -> TrainState:
    """Trains to `steps`, from the newest good checkpoint in `workdir/checkpoints` if there is one.

    A row of metrics holds those of the step (`make_step`), of the hooks due, and `tokens` (so far), `epoch` (if the
    data have epochs), `batch` (a hash of the batch over all processes), `step_seconds`, `tokens_per_second`, `mfu`
    (given `speed`, and where that is at most 1) and `memory_bytes`. None of them counts time spent in hooks
    and saves.

    Args:
        guard: the one that `program` was made with; its `then` decides what follows a bad step.
        frozen: `Objective.frozen`, on the mesh.
        fence: asked before everything that is written to `workdir`, and before each row.

    Raises:
        Locked: another run holds the checkpoint folder; `tracker.finish` is not called.
        Superseded: a later attempt has the run; nothing is written any more, so `tracker.finish` is not called.
        Preempted: SIGTERM, SIGUSR1 or (`signals.Interrupted`) Ctrl-C; the state is saved.
        Diverged: the guard stopped the run; the bad batches are in `workdir/evidence`.
        StorageError: a checkpoint cannot be written or read.
    """
    alone = Alone(program, frozen)
    with Signals() as signals:
        return alone(
            training(
                program, alone, signals, data=data, steps=steps, workdir=workdir, tracker=tracker, guard=guard,
                checkpoints=checkpoints, hooks=hooks, frozen=frozen, speed=speed, log_every=log_every, say=say,
                fence=fence,
            )
        )  # fmt: skip


def training(
    program: Program,
    held: Held,
    signals: Signals,
    *,
    data: BatchStream,
    steps: int,
    workdir: Path,
    tracker: Tracker,
    guard: Guard,
    checkpoints: Checkpoints,
    hooks: Sequence[Hook] = (),
    frozen: Frozen = (),
    speed: Speed | None = None,
    log_every: int = 1,
    say: Callable[[str], None] = print,
    fence: Fence = OPEN,
) -> Steps:
    """`train` as a generator: whoever drives it computes its steps.

    Args:
        held: where the driver keeps the run's state.
        signals: of the process.
    """
    first = jax.process_index() == 0
    tracker, say = (tracker, say) if first else (Silent(), silent)
    status = "failed"
    try:
        with Checkpointer(workdir / "checkpoints", checkpoints, say, fence) as saved:
            run = _Run(
                program=program, data=data, steps=steps, workdir=workdir, tracker=tracker, guard=guard, saved=saved,
                hooks=hooks, frozen=frozen, speed=speed, log_every=log_every, say=say, signals=signals, held=held,
                fence=fence,
            )  # fmt: skip
            state = yield from run.advancing()
        status = "complete"
        return state
    except (Locked, Superseded):
        status = ""
        raise
    except Diverged:
        status = "diverged"
        raise
    except Preempted:
        status = "preempted"
        raise
    finally:
        if status and fence.mine():
            tracker.finish(status)


@dataclass(kw_only=True)
class _Run:
    """One process's part in a run: the arguments of `train`, and the values that change during the run."""

    program: Program
    data: BatchStream
    steps: int
    workdir: Path
    tracker: Tracker
    guard: Guard
    saved: Checkpointer
    hooks: Sequence[Hook]
    frozen: Frozen
    speed: Speed | None
    log_every: int
    say: Callable[[str], None]
    signals: Signals
    held: Held
    fence: Fence
    rollbacks: int = 0
    marked: tuple[float, int] = (0.0, 0)
    """Monotonic seconds and step from which the speed is measured"""
    faster: int = 0
    """Rows that were faster than `Speed.peak_flops`"""
    settled: float = 0.0
    """Monotonic seconds at which the latest step was seen to be complete"""

    def advancing(self) -> Steps:
        step = self.restore()
        policy, consensus = self.saved.policy, make_consensus(self.program.mesh)
        last_save = time.monotonic()
        pending: Pending | None = None
        while step < self.steps:
            batch = next(self.data)
            metrics = yield batch
            assert metrics is not None, "whoever computes the step answers with its metrics"
            step += 1
            at_once = metrics.is_ready() and (pending is None or pending.done is not None)
            done = time.monotonic() if at_once else None
            overdue = 0 < policy.seconds <= time.monotonic() - last_save
            rows = batch_hash(batch, jax.process_index() * len(batch.tokens))
            agreed = consensus((self.signals.received is not None, overdue), rows)
            previous, pending = pending, Pending(step, batch, self.data.state(), metrics, agreed, done)

            stop = save = False
            if previous is not None:  # while the device computes this step, read the one before
                settled = self.settle(previous)
                if settled.then is Then.ROLL_BACK:
                    step, pending = self.roll_back(previous), None
                    continue
                stop, save = settled.stop, settled.save
                self.log(previous.step, settled.metrics)

            due = [hook for hook in self.hooks if hook.due(step, self.steps)]
            save |= step == self.steps or policy.due(step)
            if not (due or save or stop):
                continue

            settled = self.settle(pending)
            if settled.then is Then.ROLL_BACK:
                step, pending = self.roll_back(pending), None
                continue
            state = self.held.get()
            row = settled.metrics
            self.fence.check()
            for hook in due:
                row |= hook(At(step, state, self.program, self.frozen, self.workdir, self.say))
            if step == self.steps and policy.best and policy.best not in row:
                self.say(
                    f"no best checkpoint was kept: checkpoints.best is {policy.best!r}, which is no metric; "
                    f"there are: {', '.join(row)}"
                )
            self.log(step, row, always=bool(due))
            if save or stop or settled.save or settled.stop or self.saved.improves(row):
                extra = {"data": pending.position, "tracker": self.tracker.state(), "rollbacks": self.rollbacks}
                self.saved.save(step, state, extra, row)
                last_save = time.monotonic()
            del state  # it may be a copy
            if (stop or settled.stop) and step < self.steps:
                self.saved.wait()
                raise self.signals.error(step)
            pending = None
            self.marked = (time.monotonic(), step)
        self.saved.wait()
        self.fence.check(now=True)
        self.tracker.artifact(self.saved.folder / str(step), "checkpoint", {"step": step})
        return self.held.get()

    def restore(self) -> int:
        """Sets the state of the newest good checkpoint, or of step 0 if there is none. Returns its step."""
        restored = self.saved.restore(self.program.abstract)
        step = restored.step if restored else 0
        if restored:
            self.data.restore(restored.extra["data"])
            self.rollbacks = restored.extra["rollbacks"]
            self.say(f"resumed after step {step} of {self.steps}")
        self.tracker.resume(step)
        self.marked = (time.monotonic(), step)
        self.held.set(restored.state if restored else self.program.init())
        return step

    def roll_back(self, bad: Pending) -> int:
        """Sets the state of the newest good checkpoint; the data go on after the bad batch. Returns its step."""
        rollbacks = self.rollbacks + 1
        step = self.restore()
        self.rollbacks = rollbacks
        self.data.restore(bad.position)
        self.say(f"rolled back to step {step}; the data up to the batch of step {bad.step} are skipped")
        return step

    def settle(self, pending: Pending) -> Settled:
        """Waits for a step, reads its metrics, and lets the guard decide what follows if it was bad.

        Raises:
            Diverged: the guard stops the run.
            StorageError: a save in the background has failed.
        """
        row = pending.metrics.read()
        self.settled = pending.done or time.monotonic()
        seconds = (self.settled - self.marked[0]) / (pending.step - self.marked[1])
        self.saved.check()
        then = Then.GO_ON
        if not row["good"]:
            then = self.guard.then(int(row["consecutive"]), self.rollbacks)
            where = self.keep_evidence(pending, row)
            what = f"step {pending.step}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            self.say(f"{what}: the guard skips this update; batch and metrics are in {where}")
            if then is Then.STOP:
                so_far = f"{row['consecutive']:.0f} bad steps in a row, {self.rollbacks} rollbacks"
                fix = f"look at {where}, then lower the learning rate or change the guard"
                raise Diverged(f"{what}: {type(self.guard).__name__} gives up after {so_far}; {fix}")
        (stop, save), rows_hash = read(pending.agreed)
        return Settled(self.row(pending, row, seconds, rows_hash), then, stop, save)

    def row(self, pending: Pending, metrics: dict[str, float], seconds: float, rows_hash: int) -> dict[str, float]:
        """The metrics of a step, as they are logged."""
        per_step = pending.batch.tokens.size * jax.process_count()
        out = {name: x for name, x in metrics.items() if name not in ("good", "consecutive")}
        out["tokens"] = per_step * pending.step
        if "epoch" in pending.position:
            out["epoch"] = pending.position["epoch"]
        out["batch"] = rows_hash
        out["step_seconds"] = seconds
        out["tokens_per_second"] = per_step / seconds
        if self.speed is not None:
            mfu = per_step / seconds * self.speed.flops_per_token / self.speed.peak_flops
            if mfu <= 1:
                out["mfu"] = mfu
            else:
                self.faster += 1
                if self.faster == FASTER:
                    self.speed = None
                    self.say(
                        f"{FASTER} steps were faster than the ceiling that was measured for matrix products (step "
                        f"{pending.step}: {mfu:.0%} of it), so that figure is wrong: MFU is not shown"
                    )
        out["memory_bytes"] = memory_bytes()
        return {name: float(x) for name, x in out.items()}

    def log(self, step: int, row: dict[str, float], always: bool = False) -> None:
        if always or step % self.log_every == 0 or step == self.steps:
            self.fence.check()
            self.tracker.log(step, row)
            self.marked = (self.settled, step)

    def keep_evidence(self, pending: Pending, row: Mapping[str, float]) -> Path:
        """Writes batch and metrics of a bad step to evidence/step-<n>, with -retry-<k> after k rollbacks."""
        self.fence.check()
        retry = f"-retry-{self.rollbacks}" if self.rollbacks else ""
        at = self.workdir / "evidence" / f"step-{pending.step}{retry}"
        at.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(at / f"batch-{jax.process_index()}.npz", **_arrays(pending.batch))
        finite = {name: x if math.isfinite(x) else str(x) for name, x in row.items()}
        record = {"step": pending.step, **finite, "data": pending.position}
        (at / f"metrics-{jax.process_index()}.json").write_text(json.dumps(record, indent=1))
        return at


def _arrays(batch: Batch) -> dict[str, Any]:
    """{name: array} of a batch, including those of `extra`."""
    return {name: x for name, x in batch._asdict().items() if name != "extra"} | dict(sorted(batch.extra.items()))


def batch_hash(batch: Batch, first: int = 0) -> int:
    """The sum of 48 bits of xxh3 of each row of each array, modulo 2^48 (exact in a float64).

    A row's hash is seeded with its number and continues that of the row in the array before. `first` is the number of
    the first row, so that the hash of a batch is the sum of those of its parts."""
    arrays = [np.ascontiguousarray(x) for x in _arrays(batch).values()]

    def of_row(i: int) -> int:
        seed = first + i
        for x in arrays:
            seed = xxhash.xxh3_64_intdigest(x[i].tobytes(), seed=seed)
        return seed >> 16

    return sum(map(of_row, range(len(batch.tokens)))) % 2**48


def memory_bytes() -> int:
    """Peak memory in bytes: of the fullest device if devices report it, else of this process."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
