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
from slmjax.train import micro, stored
from slmjax.train.guard import Guard, Skip
from slmjax.train.sharding import Layout
from slmjax.train.state import Opt, evaluation_params, states
from slmjax.types import Batch, Frozen, Key, Metrics, Objective, Optimizer, Params, ParamView, TrainState

SKIP = Skip()


class Program(NamedTuple):
    """The compiled functions of a run. Made by `program`."""

    init: Callable[[], TrainState]
    """() -> the state of step 0, placed on the mesh"""
    given: Callable[[Params], TrainState]
    """The model's parameters -> the state of step 0 that starts from them instead"""
    abstract: TrainState
    """A training state as ShapeDtypeStructs with shardings, into which a checkpoint is restored"""
    step: Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]
    """One update. The state passed in is donated: use the one returned"""
    evaluate: Callable[[TrainState, Frozen, Batch], Metrics]
    """Metrics of one batch under the evaluation parameters"""
    params: Callable[[TrainState], Params]
    """The effective parameters of evaluation, sampling and export"""
    put: Callable[[Batch], Batch]
    """This process's rows -> the global batch on the mesh"""
    mesh: jax.sharding.Mesh


class Ahead:
    """A jitted function that is compiled before its first call: the memory that the compiler has used then returns to
    the system before the call, so that the peaks of compiling and of computing do not add up."""

    def __init__(self, jitted: Any):
        self.lower = jitted.lower
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        program = self._programs.get(shapes)
        if program is None:
            program = self._programs[shapes] = self.lower(state, frozen, batch).compile()
            give_back()
        return program(state, frozen, batch)

    @property
    def compiled(self) -> int:
        """Number of compiled programs: one for each shape of batch."""
        return len(self._programs)


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
    """The pure step, to be jitted with its first argument donated. `pieces`: the number of micro-batches, a function of
    the batch's shape. `gather`: see `Layout.gather`.

    Metrics, all float32 scalars: the objective's; `grad_norm` (before clipping), `param_norm` and `update_norm` of the
    trained parameters; `lr` (if a schedule is given); `good` (1, or 0 if the guard skipped the update), `skipped`
    (skipped so far) and `consecutive` (skipped since the last good step).
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        def model_and_own(trained: Params) -> tuple[Params, Params]:
            return stored.parts(stored.complete(trained, state.params, view.frozen))

        def loss_and_grads(trained: Params, batch: Batch, key: Key) -> tuple[Metrics, Params]:
            def loss_fn(trained: Params) -> tuple[Any, Metrics]:
                effective = gather(view.apply(*model_and_own(trained), state.view))
                return objective.loss(effective, frozen, batch, key)

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
            return _float32({"loss": loss, **metrics}), grads

        prepare_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = objective.prepare(batch, prepare_key)
        trained = stored.trained(state.params, view.frozen)
        metrics, grads = micro.accumulated(loss_and_grads, trained, batch, loss_key, pieces(batch))
        grad_norm = optax.tree.norm(grads)
        good, guard_state = guard.check(state.opt.guard, metrics["loss"], grad_norm)

        updates, opt = optimizer.update(grads, state.opt.optimizer, trained)
        updated = optax.apply_updates(trained, updates)
        after = (updated, opt, view.update(state.view, *model_and_own(updated), state.step))
        before = (trained, state.opt.optimizer, state.view)
        updated, opt, view_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        params = stored.complete(updated, state.params, view.frozen)

        measured = {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(updated),
            "update_norm": jnp.where(good, optax.tree.norm(updates), 0.0),
            "good": good,
            "skipped": guard_state.skipped,
            "consecutive": guard_state.consecutive,
        }
        if schedule is not None:  # the optimizer's own count leaves out the skipped updates too
            measured["lr"] = schedule(state.step - state.opt.guard.skipped)
        new_state = TrainState(state.step + 1, params, Opt(opt, guard_state), view_state)
        return new_state, {**metrics, **_float32(measured)}

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

    Randomness is derived from the key and the batch's tokens: different for each batch, the same at each evaluation.
    """

    def evaluate_step(state: TrainState, frozen: Frozen, batch: Batch) -> Metrics:
        def measured(params: Params, batch: Batch, key: Key) -> tuple[Metrics, tuple[()]]:
            loss, metrics = objective.loss(params, frozen, batch, key)
            return _float32({"loss": loss, **metrics}), ()

        prepare_key, loss_key = jax.random.split(jax.random.fold_in(key, jnp.sum(batch.tokens, dtype=jnp.uint32)))
        effective, batch = gather(evaluation_params(state, optimizer, view)), objective.prepare(batch, prepare_key)
        return micro.accumulated(measured, effective, batch, loss_key, pieces(batch))[0]

    return evaluate_step


def step_keys(seed: Any) -> tuple[Key, Key]:
    """The keys of a run's training steps and of its evaluations. `seed`: a number, or an array []."""
    root = jax.random.key(seed)
    return jax.random.fold_in(root, 1), jax.random.fold_in(root, 2)


def program(
    init: Callable[[Key], Params],
    axes: Any,
    objective: Objective,
    optimizer: Optimizer,
    view: ParamView,
    *,
    seed: Any = 0,
    mesh: jax.sharding.Mesh,
    layout: Layout = Layout(),  # noqa: B008
    accumulate: int = 1,
    micro_tokens: int | None = None,
    guard: Guard = SKIP,
    schedule: Callable[[Any], Any] | None = None,
) -> Program:
    """The functions of a run, placed on `mesh` and jitted (compiled at the first call).

    Args:
        init, axes: `Model.init` and `Model.axes`.
        optimizer: built for the trained parameters (`stored.optimized`).
        seed: parameters are drawn from `fold_in(key(seed), 0)` (see `states`), the steps' randomness from
            `fold_in(key(seed), 1)`. A number, or an array [].
        accumulate: micro-batches a step, at least; divides the rows of the batch.
        micro_tokens: `Compute.micro_tokens(width)`, the least tokens of a micro-batch on each device: a step has more
            than `accumulate` micro-batches as long as they stay this large. Evaluation ignores `accumulate`.
        schedule: step -> learning rate, for the metric `lr` alone: the optimizer has its own.
    """
    built = states(init, axes, optimizer, view, mesh=mesh, layout=layout, seed=seed, guard=guard)
    steps, evals = step_keys(seed)
    everywhere = NamedSharding(mesh, P())
    gather = layout.gather(stored.parts(built.abstract.params)[0], axes, mesh)
    ways = layout.ways(mesh.shape)
    placed = jax.tree.map(lambda x: x.sharding, built.abstract)

    def pieces(batch: Batch, least: int = 1) -> int:
        return micro.count(*batch.tokens.shape, ways=ways, least=least, tokens=micro_tokens)

    training = functools.partial(pieces, least=accumulate)
    step = make_step(objective, optimizer, view, steps, pieces=training, guard=guard, schedule=schedule, gather=gather)
    evaluate = make_evaluate(objective, optimizer, view, evals, pieces=pieces, gather=gather)
    return Program(
        init=built.fresh,
        given=built.given,
        abstract=built.abstract,
        step=Ahead(jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere))),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        params=built.params,
        put=lambda batch: layout.put(batch, mesh),
        mesh=mesh,
    )


def _float32(metrics: Metrics) -> Metrics:
    return {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}
