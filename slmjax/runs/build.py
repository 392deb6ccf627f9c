"""Builds the functions that an experiment describes: model, objective, optimizer and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from slmjax.config import Experiment, Runtime
from slmjax.nn.compute import Compute, for_backend
from slmjax.train import stored
from slmjax.train.sharding import Layout, Mesh
from slmjax.train.state import States, states
from slmjax.train.step import Program, program
from slmjax.types import Model, Objective, Optimizer, ParamView
from slmjax.views import carrying


class Pieces(NamedTuple):
    """The parts that define the training state of an experiment. A checkpoint is opened without the objective."""

    model: Model
    view: ParamView
    optimizer: Optimizer
    schedule: Callable[[Any], Any]


class Built(NamedTuple):
    """An experiment turned into functions."""

    model: Model
    view: ParamView
    objective: Objective
    program: Program
    compute: Compute


def pieces(experiment: Experiment, compute: Compute = Compute()) -> Pieces:  # noqa: B008
    """The model of an experiment with its view and optimizer."""
    model = experiment.model.build(compute, experiment.numerics)
    view = experiment.view.over(experiment.steps).build(model.axes)
    carried = experiment.objective.carried(experiment.model)
    view = view if carried is None else carrying(view, carried)
    schedule = experiment.schedule.build(experiment.steps)
    factors = experiment.model.initial.factors(experiment.model, experiment.optimizer.step_norms)
    optimizer = experiment.optimizer.build(schedule, *stored.optimized(model.axes, view), factors)
    return Pieces(model, view, optimizer, schedule)


def states_of(experiment: Experiment) -> States:
    """The states of an experiment on one device, for opening its checkpoints."""
    parts = pieces(experiment)
    return states(
        parts.model.init,
        parts.model.axes,
        parts.optimizer,
        parts.view,
        mesh=Mesh(data=1).build(jax.local_devices()[:1]),
        layout=Layout(),
        seed=experiment.seed,
        guard=experiment.guard,
    )


def compute_of(runtime: Runtime) -> Compute:
    """How to compute on this machine: as `runtime` says, else the default of this backend."""
    compute = runtime.compute or for_backend(jax.default_backend())
    return compute if runtime.dtype == "auto" else replace(compute, dtype=runtime.dtype)


def build(experiment: Experiment, runtime: Runtime) -> Built:
    """The model and the jitted step of an experiment, on the devices of `runtime.mesh`."""
    compute = compute_of(runtime)
    parts = pieces(experiment, compute)
    objective = experiment.objective.build(parts.model)
    compiled = program(
        parts.model.init,
        parts.model.axes,
        objective,
        parts.optimizer,
        parts.view,
        seed=experiment.seed,
        mesh=runtime.mesh.build(),
        layout=runtime.layout,
        accumulate=experiment.accumulate,
        micro_tokens=compute.micro_tokens(experiment.model.width),
        guard=experiment.guard,
        schedule=parts.schedule,
    )
    return Built(parts.model, parts.view, objective, compiled, compute)
