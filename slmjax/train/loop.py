"""The training loop: it feeds batches to the step, and reads the metrics of each step while the device computes the
next. Hooks, guard and checkpoint policy decide everything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slmjax.errors import Diverged, Preempted
from slmjax.lease import Superseded
from slmjax.train.advance import Alone, Held, Measured, Steps
from slmjax.train.checkpoint import Checkpointer, Checkpoints
from slmjax.train.consensus import make_consensus, read
from slmjax.train.guard import Guard, Then
from slmjax.train.hooks import At, Hook, Silent, Tracker, silent
from slmjax.train.lock import OPEN, Fence, Locked
from slmjax.train.rows import batch_hash, keep, memory_bytes
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run trains, on which data, and what it does besides."""

    program: Program
    data: BatchStream
    steps: int
    workdir: Path
    """The run folder; its checkpoints are in `checkpoints`"""
    tracker: Tracker
    guard: Guard
    """The one that `program` was made with; its `then` decides what follows a bad step"""
    checkpoints: Checkpoints
    hooks: Sequence[Hook] = ()
    frozen: Frozen = ()
    """`Objective.frozen`, on the mesh"""
    speed: Speed | None = None
    log_every: int = 1
    say: Callable[[str], None] = print
    fence: Fence = OPEN
    """Asked before everything that is written to `workdir`, and before each row"""


def train(job: Job) -> TrainState:
    """Trains to `steps`, from the newest good checkpoint in `workdir/checkpoints` if there is one.

    A row of metrics holds those of the step (`make_step`), of the hooks due, and `tokens` (so far), `epoch` (if the
    data have epochs), `batch` (a hash of the batch over all processes), `step_seconds`, `tokens_per_second`, `mfu`
    (given `speed`, and where that is at most 1) and `memory_bytes`. None of them counts time spent in hooks
    and saves.

    Raises:
        Locked: another run holds the checkpoint folder; `tracker.finish` is not called.
        Superseded: a later attempt has the run; nothing is written any more, so `tracker.finish` is not called.
        Preempted: SIGTERM, SIGUSR1 or (`signals.Interrupted`) Ctrl-C; the state is saved.
        Diverged: the guard stopped the run; the bad batches are in `workdir/evidence`.
        StorageError: a checkpoint cannot be written or read.
    """
    alone = Alone(job.program, job.frozen)
    with Signals() as signals:
        return alone(training(job, alone, signals))


def training(job: Job, held: Held, signals: Signals) -> Steps:
    """`train` as a generator: whoever drives it computes its steps.

    Args:
        held: where the driver keeps the run's state.
        signals: of the process.
    """
    if jax.process_index() != 0:
        job = replace(job, tracker=Silent(), say=silent)
    status = "failed"
    try:
        with Checkpointer(job.workdir / "checkpoints", job.checkpoints, job.say, job.fence) as saved:
            state = yield from _Run(job=job, saved=saved, signals=signals, held=held, speed=job.speed).advancing()
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
        if status and job.fence.mine():
            job.tracker.finish(status)


@dataclass(kw_only=True)
class _Run:
    """One process's part in a run, with the values that change during it."""

    job: Job
    saved: Checkpointer
    signals: Signals
    held: Held
    speed: Speed | None
    """That of the job, unless it turns out to be wrong"""
    rollbacks: int = 0
    marked: tuple[float, int] = (0.0, 0)
    """Monotonic seconds and step from which the speed is measured"""
    faster: int = 0
    """Rows that were faster than `Speed.peak_flops`"""
    settled: float = 0.0
    """Monotonic seconds at which the latest step was seen to be complete"""

    def advancing(self) -> Steps:
        step = self.restore()
        policy, consensus = self.saved.policy, make_consensus(self.job.program.mesh)
        last_save = time.monotonic()
        pending: Pending | None = None
        while step < self.job.steps:
            batch = next(self.job.data)
            metrics = yield batch
            assert metrics is not None, "whoever computes the step answers with its metrics"
            step += 1
            at_once = metrics.is_ready() and (pending is None or pending.done is not None)
            done = time.monotonic() if at_once else None
            overdue = 0 < policy.seconds <= time.monotonic() - last_save
            rows = batch_hash(batch, jax.process_index() * len(batch.tokens))
            agreed = consensus((self.signals.received is not None, overdue), rows)
            previous, pending = pending, Pending(step, batch, self.job.data.state(), metrics, agreed, done)

            stop = save = False
            if previous is not None:  # while the device computes this step, read the one before
                settled = self.settle(previous)
                if settled.then is Then.ROLL_BACK:
                    step, pending = self.roll_back(previous), None
                    continue
                stop, save = settled.stop, settled.save
                self.log(previous.step, settled.metrics)

            due = [hook for hook in self.job.hooks if hook.due(step, self.job.steps)]
            save |= step == self.job.steps or policy.due(step)
            if not (due or save or stop):
                continue

            settled = self.settle(pending)
            if settled.then is Then.ROLL_BACK:
                step, pending = self.roll_back(pending), None
                continue
            state = self.held.get()
            row = settled.metrics
            self.job.fence.check()
            for hook in due:
                row |= hook(At(step, state, self.job.program, self.job.frozen, self.job.workdir, self.job.say))
            if step == self.job.steps and policy.best and policy.best not in row:
                self.job.say(
                    f"no best checkpoint was kept: checkpoints.best is {policy.best!r}, which is no metric; "
                    f"there are: {', '.join(row)}"
                )
            self.log(step, row, always=bool(due))
            if save or stop or settled.save or settled.stop or self.saved.improves(row):
                extra = {"data": pending.position, "tracker": self.job.tracker.state(), "rollbacks": self.rollbacks}
                self.saved.save(step, state, extra, row)
                last_save = time.monotonic()
            del state  # it may be a copy
            if (stop or settled.stop) and step < self.job.steps:
                self.saved.wait()
                raise self.signals.error(step)
            pending = None
            self.marked = (time.monotonic(), step)
        self.saved.wait()
        self.job.fence.check(now=True)
        self.job.tracker.artifact(self.saved.folder / str(step), "checkpoint", {"step": step})
        return self.held.get()

    def restore(self) -> int:
        """Sets the state of the newest good checkpoint, or of step 0 if there is none. Returns its step."""
        restored = self.saved.restore(self.job.program.abstract)
        step = restored.step if restored else 0
        if restored:
            self.job.data.restore(restored.extra["data"])
            self.rollbacks = restored.extra["rollbacks"]
            self.job.say(f"resumed after step {step} of {self.job.steps}")
        self.job.tracker.resume(step)
        self.marked = (time.monotonic(), step)
        self.held.set(restored.state if restored else self.job.program.init())
        return step

    def roll_back(self, bad: Pending) -> int:
        """Sets the state of the newest good checkpoint; the data go on after the bad batch. Returns its step."""
        rollbacks = self.rollbacks + 1
        step = self.restore()
        self.rollbacks = rollbacks
        self.job.data.restore(bad.position)
        self.job.say(f"rolled back to step {step}; the data up to the batch of step {bad.step} are skipped")
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
            then = self.job.guard.then(int(row["consecutive"]), self.rollbacks)
            self.job.fence.check()
            retry = f"-retry-{self.rollbacks}" if self.rollbacks else ""
            where = self.job.workdir / "evidence" / f"step-{pending.step}{retry}"
            keep(where, pending.batch, {"step": pending.step, **row}, pending.position)
            what = f"step {pending.step}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            self.job.say(f"{what}: the guard skips this update; batch and metrics are in {where}")
            if then is Then.STOP:
                so_far = f"{row['consecutive']:.0f} bad steps in a row, {self.rollbacks} rollbacks"
                fix = f"look at {where}, then lower the learning rate or change the guard"
                raise Diverged(f"{what}: {type(self.job.guard).__name__} gives up after {so_far}; {fix}")
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
                    self.job.say(
                        f"{FASTER} steps were faster than the ceiling that was measured for matrix products (step "
                        f"{pending.step}: {mfu:.0%} of it), so that figure is wrong: MFU is not shown"
                    )
        out["memory_bytes"] = memory_bytes()
        return {name: float(x) for name, x in out.items()}

    def log(self, step: int, row: dict[str, float], always: bool = False) -> None:
        if always or step % self.job.log_every == 0 or step == self.job.steps:
            self.job.fence.check()
            self.job.tracker.log(step, row)
            self.marked = (self.settled, step)
