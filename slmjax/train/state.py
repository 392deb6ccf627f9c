"""The state that a run begins with, where its arrays lie, and the parameters that are evaluated: no objective in it, so
that a checkpoint can be opened without what the run was trained towards (a teacher, say)."""

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
    """`TrainState.opt`: what the optimizer keeps, and what the guard has seen."""

    optimizer: Any
    guard: GuardState


class States(NamedTuple):
    """How the states of a run come about and lie on the mesh. Made by `states`."""

    fresh: Callable[[], TrainState]
    """() -> the state of step 0 with parameters drawn from the seed, each array where it belongs"""
    given: Callable[[Params], TrainState]
    """The model's parameters (arrays of any placement, numpy too) -> the state of step 0 that starts from them"""
    abstract: TrainState
    """The same as ShapeDtypeStructs with shardings: what a checkpoint is restored into"""
    params: Callable[[TrainState], Params]
    """The effective parameters of evaluation, sampling and export"""


def init_state(
    init: Callable[[Key], Params], optimizer: Optimizer, view: ParamView, guard: Guard, key: Key, view_key: Key = None
) -> TrainState:
    """The state of step 0. `key` seeds the model's parameters and nothing else, `view_key` those of the view (by
    default it follows from `key`)."""
    params = init(key)
    own, viewed = view.init(params, jax.random.fold_in(key, 0) if view_key is None else view_key)
    everything = stored.join(params, own)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=everything,
        opt=Opt(optimizer.init(stored.trained(everything, view.frozen)), guard.init()),
        view=viewed,
    )


def evaluation_params(state: TrainState, optimizer: Optimizer, view: ParamView) -> Params:
    """The effective parameters of evaluation, sampling and export: those that the optimizer wants evaluated
    (schedule-free averages), as the view transforms them for evaluation (EMA, quantization)."""
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
    """
    Args:
        init, axes: `Model.init` and `Model.axes`.
        optimizer: that of the trained parameters (`stored.optimized`).
        seed: parameters are drawn from `fold_in(key(seed), 0)`, those of the view from `fold_in(key(seed), 3)`.
    """
    root = jax.random.key(seed)

    def begin(init: Callable[[Key], Params]) -> TrainState:
        return init_state(init, optimizer, view, guard, jax.random.fold_in(root, 0), jax.random.fold_in(root, 3))

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
