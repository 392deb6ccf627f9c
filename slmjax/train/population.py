"""Runs of one shape that train as one compiled step: `jax.vmap` of the step of a single run over what differs between
them, such as seeds, learning rates and weight decays.

Each run has its own loop (`loop.training`) and so its own folder, checkpoints, guard, hooks and trackers; only the
computation of a step is shared. States and batches are stacked on a leading axis, which is split over the devices.
A run that has ended, or diverged, keeps its place until the others end: its results are no longer read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax.errors import UserError
from slmjax.train import micro
from slmjax.train.advance import Measured, Steps
from slmjax.train.guard import Guard
from slmjax.train.state import evaluation_params, seeded_state
from slmjax.train.step import Ahead, Program, make_evaluate, make_step, step_keys
from slmjax.types import Batch, Frozen, Key, Metrics, Objective, Optimizer, Params, ParamView, TrainState

RUNS, ROWS = "runs", "rows"
"""Axes of the mesh: the runs of a population, and the rows of each run's batch"""

Values = Mapping[str, Any]
"""What is a run's own, by name: numbers, or arrays []; equal names in every run"""


class Member(NamedTuple):
    """What a run computes, made of its `Values`, which may be traced."""

    init: Callable[[Key], Params]
    objective: Objective
    optimizer: Optimizer
    view: ParamView
    guard: Guard
    schedule: Callable[[Any], Any]
    seed: Any


class Population:
    """Runs that train together.

    Args:
        member: the values of a run -> what it computes. Shapes and structure are the same for all.
        values: of each run.
        frozen: `Objective.frozen`, the same for all.
        accumulate, micro_tokens: as for `step.program`.
        devices: all by default. As many of them hold runs as their number and that of the runs have in common; the
            rest splits the rows of each batch.

    Attributes:
        programs: of each run: how it begins, is evaluated, is restored. Their `step` computes the run alone.
    """

    def __init__(
        self,
        member: Callable[[Values], Member],
        values: Sequence[Values],
        *,
        frozen: Frozen = (),
        accumulate: int = 1,
        micro_tokens: int | None = None,
        devices: Sequence[Any] | None = None,
    ):
        if jax.process_count() > 1:
            raise UserError("runs that train together do so in one process; train them one by one instead")
        devices = jax.devices() if devices is None else devices
        self._size = len(values)
        across = math.gcd(len(devices), self._size)
        grid = np.asarray(devices).reshape(across, -1)
        auto = (jax.sharding.AxisType.Auto,) * 2  # explicit axes would ask for a sharding of every product
        self.mesh = jax.sharding.Mesh(grid, (RUNS, ROWS), axis_types=auto)
        self._whole, self._by_run = (NamedSharding(self.mesh, P(*axes)) for axes in ((), (RUNS,)))
        self.frozen = jax.device_put(frozen, self._whole)
        arrays = [jax.tree.map(_number, dict(each)) for each in values]
        stacked = jax.tree.map(lambda *x: np.stack(x), *arrays)
        self._values = jax.device_put(stacked, self._by_run)
        self._own = [jax.device_put(each, self._whole) for each in arrays]

        def begin(values: Values, init: Callable[[Key], Params] | None = None) -> TrainState:
            m = member(values)
            return seeded_state(init or m.init, m.optimizer, m.view, m.guard, m.seed)

        def step(state: TrainState, given: tuple[Values, Frozen], batch: Batch) -> tuple[TrainState, Metrics]:
            m = member(given[0])
            one = make_step(
                m.objective, m.optimizer, m.view, step_keys(m.seed)[0], guard=m.guard, schedule=m.schedule,
                pieces=functools.partial(pieces, least=accumulate, runs=self._size / across),
            )  # fmt: skip
            return one(state, given[1], batch)

        def evaluate(state: TrainState, given: tuple[Values, Frozen], batch: Batch) -> Metrics:
            m = member(given[0])
            one = make_evaluate(m.objective, m.optimizer, m.view, step_keys(m.seed)[1], pieces=pieces)
            return one(state, given[1], batch)

        def params(state: TrainState, values: Values) -> Params:
            m = member(values)
            return evaluation_params(state, m.optimizer, m.view)

        def pieces(batch: Batch, least: int = 1, runs: float = 1.0) -> int:
            # The micro-batches of all runs of a device are in memory together: each is as much smaller.
            tokens = None if micro_tokens is None else math.ceil(micro_tokens / runs)
            return micro.count(*batch.tokens.shape, ways=self._split(batch), least=least, tokens=tokens)

        shapes = jax.eval_shape(begin, arrays[0])
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole), shapes)
        together = jax.vmap(step, in_axes=(0, (0, None), 0))
        self._step = Ahead(jax.jit(together, donate_argnums=0, out_shardings=(self._by_run, self._whole)))
        self._init = jax.jit(begin, out_shardings=self._whole)
        self._given = jax.jit(lambda v, params: begin(v, lambda key: params), out_shardings=self._whole)
        self._alone = Ahead(jax.jit(step, donate_argnums=0, out_shardings=(self._whole, self._whole)))
        self._evaluate = jax.jit(evaluate, out_shardings=self._whole)
        self._params = jax.jit(params)
        self._get = jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states), out_shardings=self._whole)
        self._set = jax.jit(
            lambda states, i, state: jax.tree.map(lambda x, new: x.at[i].set(new), states, state),
            donate_argnums=0, out_shardings=self._by_run,
        )  # fmt: skip
        self._states = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros((self._size, *x.shape), x.dtype), shapes),
            out_shardings=self._by_run,
        )()
        self.programs = tuple(map(self._program, self._own))

    def held(self, i: int) -> _Place:
        """Where run i keeps its state."""
        return _Place(self, i)

    def train(self, runs: Sequence[Steps]) -> list[Exception | None]:
        """Drives the runs, each to its end, whatever becomes of the others.

        Args:
            runs: `loop.training` of each, with `held(i)`.

        Returns:
            For each run what it ended with: None if it is complete.
        """
        ended: dict[int, Exception | None] = {}
        batches: list[Batch | None] = [None] * self._size
        measured: list[Measured | None] = [None] * self._size
        try:
            while True:
                for i, run in enumerate(runs):
                    if i not in ended:
                        try:
                            batches[i] = run.send(measured[i])
                        except StopIteration:
                            ended[i] = None
                        except Exception as error:
                            ended[i] = error
                if len(ended) == self._size:
                    return [ended[i] for i in range(self._size)]
                some = next(batch for batch in batches if batch is not None)
                stacked = self._stacked([some if batch is None else batch for batch in batches])
                self._states, metrics = self._step(self._states, (self._values, self.frozen), stacked)
                several = _OfSeveral(metrics)
                measured = [_OfMember(several, i) for i in range(self._size)]
        except BaseException as error:
            for i, run in enumerate(runs):
                if i not in ended:
                    try:
                        run.throw(error)
                    except BaseException as again:
                        if again is not error:
                            raise
            raise

    def get(self, i: int) -> TrainState:
        return self._get(self._states, i)

    def set(self, i: int, state: TrainState) -> None:
        self._states = self._set(self._states, i, state)

    def _split(self, batch: Batch) -> int:
        """Over how many devices the rows of a run's batch are split."""
        rows = self.mesh.shape[ROWS]
        return rows if batch.tokens.shape[0] % rows == 0 else 1

    def _stacked(self, batches: Sequence[Batch]) -> Batch:
        """[B, ...] of each run -> [runs, B, ...] on the mesh."""
        axes = P(RUNS, ROWS) if self._split(batches[0]) > 1 else P(RUNS)
        stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
        return jax.device_put(stacked, NamedSharding(self.mesh, axes))

    def _program(self, values: Values) -> Program:
        def put(batch: Batch) -> Batch:
            every = batch.tokens.shape[0] % self.mesh.size == 0
            return jax.device_put(batch, NamedSharding(self.mesh, P((RUNS, ROWS)) if every else P()))

        return Program(
            init=lambda: self._init(values),
            given=lambda params: self._given(values, params),
            abstract=self._abstract,
            step=lambda state, frozen, batch: self._alone(state, (values, frozen), batch),
            evaluate=lambda state, frozen, batch: self._evaluate(state, (values, frozen), batch),
            params=lambda state: self._params(state, values),
            put=put,
            mesh=self.mesh,
        )


class _Place(NamedTuple):
    """`advance.Held` of one run of a population."""

    population: Population
    i: int

    def get(self) -> TrainState:
        return self.population.get(self.i)

    def set(self, state: TrainState) -> None:
        self.population.set(self.i, state)


class _OfSeveral:
    """The metrics of a step of all runs, each [runs]; fetched once."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def is_ready(self) -> bool:
        return self.metrics["loss"].is_ready()

    @functools.cached_property
    def rows(self) -> Mapping[str, np.ndarray]:
        return jax.device_get(self.metrics)


class _OfMember(NamedTuple):
    """`advance.Measured` of one run of a population."""

    several: _OfSeveral
    i: int

    def is_ready(self) -> bool:
        return self.several.is_ready()

    def read(self) -> dict[str, float]:
        return {name: float(x[self.i]) for name, x in self.several.rows.items()}


def _number(x: Any) -> np.ndarray:
    """As an array [] of the type that a plain number has in a jitted function."""
    return np.asarray(x, np.uint32 if isinstance(x, int) else np.float32)
