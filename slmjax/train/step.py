"""One training step, one evaluation step: pure functions, jitted once, the same on one device and on many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax.platform import give_back
from slmjax.train import micro, sharding
from slmjax.train.guard import Guard, GuardState, Skip
from slmjax.types import Batch, Frozen, Key, Metrics, Objective, Optimizer, Params, ParamView, TrainState

SKIP = Skip()


class Opt(NamedTuple):
    """`TrainState.opt`: what the optimizer keeps, and what the guard has seen."""

    optimizer: Any
    guard: GuardState


class Program(NamedTuple):
    """The compiled pieces of a run. Made by `program`."""

    init: Callable[[], TrainState]
    """() -> the state of step 0, each array where it belongs"""
    abstract: TrainState
    """The same as ShapeDtypeStructs with shardings: what a checkpoint is restored into"""
    step: Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]
    """One update. The state given is donated: use the one returned"""
    evaluate: Callable[[TrainState, Frozen, Batch], Metrics]
    """Metrics of one batch under the evaluation parameters"""
    params: Callable[[TrainState], Params]
    """The effective parameters of evaluation, sampling and export"""
    put: Callable[[Batch], Batch]
    """This process's rows -> the global batch on the mesh"""
    mesh: jax.sharding.Mesh


class Ahead:
    """A jitted function that is compiled before its first call, not in it: in between, what the compiler took is given
    back to the system, so that the peaks of compiling and of computing do not add up."""

    def __init__(self, jitted: Any):
        self.lower = jitted.lower
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        program = self._programs.get(batch.tokens.shape)
        if program is None:
            program = self._programs[batch.tokens.shape] = self.lower(state, frozen, batch).compile()
            give_back()
        return program(state, frozen, batch)

    @property
    def compiled(self) -> int:
        """How many programs there are: one for each shape of batch that it was called with."""
        return len(self._programs)


def init_state(
    init: Callable[[Key], Params], optimizer: Optimizer, view: ParamView, guard: Guard, key: Key
) -> TrainState:
    """The state of step 0. `key` seeds the parameters and nothing else."""
    params = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=Opt(optimizer.init(params), guard.init()),
        view=view.init(params),
    )


def evaluation_params(state: TrainState, optimizer: Optimizer, view: ParamView) -> Params:
    """The effective parameters of evaluation, sampling and export: first the optimizer's say (schedule-free averages),
    then the view's (EMA, quantization)."""
    return view.evaluate(optimizer.evaluate(state.opt.optimizer, state.params), state.view)


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    view: ParamView,
    key: Key,
    *,
    pieces: Callable[[Batch], int] = lambda batch: 1,
    guard: Guard = SKIP,
    schedule: Callable[[Any], Any] | None = None,
    gather: Callable[[Params], Params] = lambda params: params,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]:
    """The pure step, to be jitted with its first argument donated. `pieces`: the number of micro-batches, known from a
    batch's shape. `gather`: see `sharding.gathered`.

    Metrics, all float32 scalars: the objective's, `grad_norm` (before clipping), `param_norm`, `update_norm`,
    `lr` (where a schedule is given), `good` (1, or 0 where the guard refused the update), `skipped` (refused so far)
    and `consecutive` (refused since the last good step).
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_and_grads(params: Params, batch: Batch, key: Key) -> tuple[Metrics, Params]:
            def loss_fn(params: Params) -> tuple[Any, Metrics]:
                effective = gather(view.apply(params, state.view))
                return objective.loss(effective, frozen, batch, key)

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            return _float32({"loss": loss, **metrics}), grads

        asking, losing = jax.random.split(jax.random.fold_in(key, state.step))
        batch = objective.ask(batch, asking)
        metrics, grads = micro.accumulated(loss_and_grads, state.params, batch, losing, pieces(batch))
        grad_norm = optax.tree.norm(grads)
        good, watched = guard.check(state.opt.guard, metrics["loss"], grad_norm)

        updates, opt = optimizer.update(grads, state.opt.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        after = (params, opt, view.update(state.view, params, state.step))
        before = (state.params, state.opt.optimizer, state.view)
        params, opt, viewed = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)

        measured = {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": jnp.where(good, optax.tree.norm(updates), 0.0),
            "good": good,
            "skipped": watched.skipped,
            "consecutive": watched.consecutive,
        }
        if schedule is not None:  # the optimizer counts the updates that it made, and so do we
            measured["lr"] = schedule(state.step - state.opt.guard.skipped)
        return TrainState(state.step + 1, params, Opt(opt, watched), viewed), {**metrics, **_float32(measured)}

    return train_step


def make_evaluate(
    objective: Objective,
    optimizer: Optimizer,
    view: ParamView,
    key: Key,
    *,
    pieces: Callable[[Batch], int] = lambda batch: 1,
    gather: Callable[[Params], Params] = lambda params: params,
) -> Callable[[TrainState, Frozen, Batch], Metrics]:
    """(state, frozen, batch) -> the objective's metrics under the evaluation parameters, in micro-batches too.

    What is random follows from the key and the batch's tokens: another draw for each batch, the same each time.
    """

    def evaluate_step(state: TrainState, frozen: Frozen, batch: Batch) -> Metrics:
        def measured(params: Params, batch: Batch, key: Key) -> tuple[Metrics, tuple[()]]:
            loss, metrics = objective.loss(params, frozen, batch, key)
            return _float32({"loss": loss, **metrics}), ()

        asking, losing = jax.random.split(jax.random.fold_in(key, jnp.sum(batch.tokens, dtype=jnp.uint32)))
        effective, batch = gather(evaluation_params(state, optimizer, view)), objective.ask(batch, asking)
        return micro.accumulated(measured, effective, batch, losing, pieces(batch))[0]

    return evaluate_step


def program(
    init: Callable[[Key], Params],
    axes: Any,
    objective: Objective,
    optimizer: Optimizer,
    view: ParamView,
    *,
    seed: int = 0,
    mesh: jax.sharding.Mesh,
    accumulate: int = 1,
    micro_tokens: int | None = None,
    guard: Guard = SKIP,
    schedule: Callable[[Any], Any] | None = None,
) -> Program:
    """Everything that a run computes, placed on `mesh` and jitted (compiled at the first call).

    Args:
        init, axes: `Model.init` and `Model.axes`.
        seed: parameters are drawn from `fold_in(key(seed), 0)`, the steps' randomness from `fold_in(key(seed), 1)`.
        accumulate: micro-batches a step, at least; divides the rows of the batch.
        micro_tokens: `Compute.micro_tokens(width)`: more micro-batches than that, while they stay this large.
            Evaluation has as many as this alone asks for.
        schedule: step -> learning rate, for the metric `lr` alone: the optimizer has its own.
    """
    root = jax.random.key(seed)
    begin, steps, evals = (jax.random.fold_in(root, i) for i in range(3))

    def fresh() -> TrainState:
        return init_state(init, optimizer, view, guard, begin)

    shapes = jax.eval_shape(fresh)
    everywhere = NamedSharding(mesh, P())
    params = sharding.shardings(shapes.params, axes, mesh)
    placed: Any = shapes._replace(
        step=everywhere,
        params=params,
        opt=sharding.mirror(shapes.opt, shapes.params, params, mesh),
        view=sharding.mirror(shapes.view, shapes.params, params, mesh),
    )
    gather = sharding.gathered(shapes.params, axes, mesh)
    ways = sharding.ways(mesh.shape)

    def pieces(batch: Batch, least: int = 1) -> int:
        return micro.count(*batch.tokens.shape, ways=ways, least=least, tokens=micro_tokens)

    training = functools.partial(pieces, least=accumulate)
    step = make_step(objective, optimizer, view, steps, pieces=training, guard=guard, schedule=schedule, gather=gather)
    evaluate = make_evaluate(objective, optimizer, view, evals, pieces=pieces, gather=gather)
    return Program(
        init=jax.jit(fresh, out_shardings=placed),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed),
        step=Ahead(jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere))),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        params=jax.jit(lambda state: evaluation_params(state, optimizer, view)),
        put=lambda batch: sharding.put(batch, mesh),
        mesh=mesh,
    )


def _float32(metrics: Metrics) -> Metrics:
    return {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}
