"""The training state of step 0, the placement of its arrays, and the parameters to evaluate. None of it depends on the
objective, so a checkpoint can be opened without the objective's own models (such as a teacher)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax.train import sharding, stored
from slmjax.train.guard import Guard, GuardState
from slmjax.train.sharding import Layout
from slmjax.types import Key, Optimizer, Params, ParamView, TrainState


class Opt(NamedTuple):
    """`TrainState.opt`: the states of the optimizer and of the guard."""

    optimizer: Any
    guard: GuardState


class States(NamedTuple):
    """How the training states of a run are made and placed on the mesh. Made by `states`."""

    fresh: Callable[[], TrainState]
    """() -> the state of step 0 with parameters drawn from the seed, placed on the mesh"""
    given: Callable[[Params], TrainState]
    """The model's parameters (arrays of any placement, numpy too) -> the state of step 0 that starts from them"""
    abstract: TrainState
    """A training state as ShapeDtypeStructs with shardings, into which a checkpoint is restored"""
    params: Callable[[TrainState], Params]
    """The effective parameters of evaluation, sampling and export"""


def init_state(
    init: Callable[[Key], Params], optimizer: Optimizer, view: ParamView, guard: Guard, key: Key, view_key: Key = None
) -> TrainState:
    """The state of step 0. `key` seeds the model's parameters alone, `view_key` those of the view (default: a key
    derived from `key`)."""
    params = init(key)
    own, view_state = view.init(params, jax.random.fold_in(key, 0) if view_key is None else view_key)
    all_params = stored.join(params, own)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=all_params,
        opt=Opt(optimizer.init(stored.trained(all_params, view.frozen)), guard.init()),
        view=view_state,
    )


def seeded_state(
    init: Callable[[Key], Params], optimizer: Optimizer, view: ParamView, guard: Guard, seed: Any
) -> TrainState:
    """The state of step 0 of a run with this seed, a number or an array []."""
    root = jax.random.key(seed)
    return init_state(init, optimizer, view, guard, jax.random.fold_in(root, 0), jax.random.fold_in(root, 3))


def evaluation_params(state: TrainState, optimizer: Optimizer, view: ParamView) -> Params:
    """The effective parameters of evaluation, sampling and export: those that the optimizer gives for evaluation
    (schedule-free averages), transformed by the view's `evaluate` (EMA, quantization)."""
    trained = optimizer.evaluate(state.opt.optimizer, stored.trained(state.params, view.frozen))
    params, own = stored.parts(stored.complete(trained, state.params, view.frozen))
    return view.evaluate(params, own, state.view)


def states(
    init: Callable[[Key], Params],
    axes: Any,
    optimizer: Optimizer,
    view: ParamView,
    *,
    mesh: jax.sharding.Mesh,
    layout: Layout = Layout(),  # noqa: B008
    seed: Any = 0,
    guard: Guard,
) -> States:
    """The functions that make training states on this mesh.

    Args:
        init, axes: `Model.init` and `Model.axes`.
        optimizer: built for the trained parameters (`stored.optimized`).
        seed: parameters are drawn from `fold_in(key(seed), 0)`, those of the view from `fold_in(key(seed), 3)`.
    """

    def begin(init: Callable[[Key], Params]) -> TrainState:
        return seeded_state(init, optimizer, view, guard, seed)

    shapes = jax.eval_shape(lambda: begin(init))
    params = layout.shardings(shapes.params, stored.join(axes, view.axes), mesh)
    placed: Any = shapes._replace(
        step=NamedSharding(mesh, P()),
        params=params,
        opt=sharding.mirror(shapes.opt, shapes.params, params, mesh),
        view=sharding.mirror(shapes.view, shapes.params, params, mesh),
    )
    from_given = jax.jit(lambda params: begin(lambda key: params), out_shardings=placed, donate_argnums=0)
    of_model = stored.parts(params)[0]
    return States(
        fresh=jax.jit(lambda: begin(init), out_shardings=placed),
        given=lambda params: from_given(jax.tree.map(jax.device_put, params, of_model)),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed),
        params=jax.jit(lambda state: evaluation_params(state, optimizer, view)),
    )
