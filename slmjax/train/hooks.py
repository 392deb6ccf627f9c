"""Trackers and hooks of the training loop: their protocols, and the hooks that every run may use."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from slmjax.estimate import Estimate, ratio
from slmjax.train.step import Program
from slmjax.types import Batch, Frozen, Metrics, Params, TrainState


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go. Only process 0 calls it."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def artifact(self, path: Path, kind: str, metadata: dict[str, Any]) -> None: ...

    def resume(self, step: int) -> None:
        """Training goes on after `step`: rows logged for later steps are to be discarded."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON kept in each checkpoint (a W&B run id)"""
        ...

    def finish(self, status: str) -> None:
        """The run ends. `status`: complete, preempted, diverged or failed"""
        ...


class Silent:
    """The tracker of processes other than the first."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def artifact(self, path: Path, kind: str, metadata: dict[str, Any]) -> None: ...

    def resume(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None: ...


def silent(line: str) -> None:
    """Prints nothing: the `say` of processes other than the first."""


class At(NamedTuple):
    """The argument of a hook: the run after a step."""

    step: int
    """Steps done"""
    state: TrainState
    """Valid until the next step, which donates it"""
    program: Program
    frozen: Frozen
    workdir: Path
    say: Callable[[str], None]
    """Prints one line"""


@runtime_checkable
class Hook(Protocol):
    """A value that is called after some steps. The loop waits for the device before the call, whose time is not counted
    in the speed of training."""

    def due(self, step: int, last: int) -> bool:
        """Whether it is called after `step`, given the last step of the run"""
        ...

    def __call__(self, at: At) -> Mapping[str, float]:
        """Returns metrics, which are logged with those of the step"""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The objective on held-out batches, under the evaluation parameters."""

    every: int
    """Steps; the last step is always evaluated"""
    batches: Callable[[], Iterable[Batch]]
    """() -> this process's rows of the validation batches, the same ones each time"""
    name: str = "validation"

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    def __call__(self, at: At) -> Mapping[str, float]:
        measured = [at.program.evaluate(at.state, at.frozen, at.program.put(b)) for b in self.batches()]
        rows = jax.device_get(measured)
        means = weighted_mean(rows)
        loss = loss_estimate(rows)
        means |= {"perplexity": math.exp(min(means["loss"], 700.0))}
        means |= {} if loss is None else {"loss_se": loss.se}
        return {f"{self.name}/{name}": x for name, x in means.items()}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Writes text from the model to `samples/step-<n>.txt` of the run folder."""

    every: int
    generate: Callable[[Params], str]
    """Effective parameters -> text. In a run of several processes, each calls it"""

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    def __call__(self, at: At) -> Mapping[str, float]:
        text = self.generate(at.program.params(at.state))
        if jax.process_index() == 0:
            path = at.workdir / "samples" / f"step-{at.step}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            at.say(f"sample after step {at.step}: {text.strip()}")
        return {}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Writes a trace of a few steps to `profile/` of the run folder, for `tensorboard --logdir` or Perfetto."""

    start: int = 10
    """Steps before the trace, so that it holds no compilation"""
    steps: int = 5
    """Steps in the trace"""

    @classmethod
    def of(cls, done: int, last: int) -> Profile:
        """The profile of a run that continues after step `done` and ends at step `last`: it starts early enough for
        its `steps` steps, if the run has as many left."""
        return cls(start=max(min(done + cls.start, last - cls.steps), done + 1))

    def due(self, step: int, last: int) -> bool:
        return self.start < last and step in (self.start, min(self.start + self.steps, last))

    def __call__(self, at: At) -> Mapping[str, float]:
        jax.block_until_ready(at.state)
        with contextlib.suppress(RuntimeError):  # no trace is running: it has not started, or the run was rolled back
            jax.profiler.stop_trace()
            at.say(f"the trace of steps {self.start + 1} to {at.step} is in {at.workdir / 'profile'}")
        if at.step == self.start:
            jax.profiler.start_trace(at.workdir / "profile")
        return {}


def weighted_mean(metrics: Iterable[Metrics]) -> dict[str, float]:
    """Means of several batches -> the mean over all their tokens, and the total `weight`."""
    rows = [{name: float(x) for name, x in row.items()} for row in metrics]
    total = math.fsum(row["weight"] for row in rows)
    if total == 0:
        return {"loss": math.nan, "weight": 0.0}
    names = [name for name in rows[0] if name != "weight"]
    means = {name: math.fsum(row[name] * row["weight"] for row in rows if row["weight"]) / total for name in names}
    return {**means, "weight": total}


def loss_estimate(metrics: Sequence[Metrics]) -> Estimate | None:
    """The mean loss over all tokens and its standard error, the batches being the sampling units. None for fewer than
    two batches with weight."""
    rows = [(float(row["loss"]), float(row["weight"])) for row in metrics if float(row["weight"])]
    if len(rows) < 2:
        return None
    losses, weights = np.array(rows).T
    return ratio(losses * weights, weights)
