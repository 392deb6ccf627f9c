"""How a run goes on by a step. The loop is a generator: it yields a batch where it wants a step to be computed, and
gets the metrics. So one loop serves a run by itself and a run among others (`population`)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeAlias, runtime_checkable

import jax

from slmjax.train.step import Program
from slmjax.types import Batch, Frozen, Metrics, TrainState


@runtime_checkable
class Held(Protocol):
    """Where the state of a run lies while it trains."""

    def get(self) -> TrainState:
        """Valid until the next step."""
        ...

    def set(self, state: TrainState) -> None: ...


@runtime_checkable
class Measured(Protocol):
    """The metrics of a step that the device may still be computing."""

    def is_ready(self) -> bool: ...

    def read(self) -> dict[str, float]:
        """Waits for the device."""
        ...


Steps: TypeAlias = Generator[Batch, Measured | None, TrainState]
"""A run: yields this process's rows of the next batch, gets the metrics of the step (None at first), returns the state
after the last step"""


class OfOne:
    """The metrics of a step of one run."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def is_ready(self) -> bool:
        return self.metrics["loss"].is_ready()

    def read(self) -> dict[str, float]:
        return {name: float(x) for name, x in jax.device_get(self.metrics).items()}


class Alone:
    """Advances a run by itself."""

    def __init__(self, program: Program, frozen: Frozen):
        self.program, self.frozen = program, frozen
        self._state: TrainState | None = None

    def get(self) -> TrainState:
        assert self._state is not None, "a run sets its state before it yields its first batch"
        return self._state

    def set(self, state: TrainState) -> None:
        self._state = state

    def __call__(self, run: Steps) -> TrainState:
        measured: Measured | None = None
        while True:
            try:
                batch = run.send(measured)
            except StopIteration as end:
                return end.value
            try:
                state, metrics = self.program.step(self.get(), self.frozen, self.program.put(batch))
            except BaseException as error:
                run.throw(error)
                raise
            self._state, measured = state, OfOne(metrics)
