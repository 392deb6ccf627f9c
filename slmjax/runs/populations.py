"""Which experiments may train as one compiled step, and how they do (`train.population`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from slmjax.config import Experiment, Runtime
from slmjax.errors import Diverged, Preempted, UserError
from slmjax.nn.compute import Compute
from slmjax.runs.build import Built, pieces
from slmjax.runs.folder import held
from slmjax.runs.launch import Ready, job, next_steps, prepare
from slmjax.runs.same_compute import settle
from slmjax.serialise import differences, fingerprint, to_json
from slmjax.traced import numbers
from slmjax.track.wandb_run import Server
from slmjax.train.lock import Fence
from slmjax.train.loop import training
from slmjax.train.population import Member, Population, Values
from slmjax.train.processes import Local
from slmjax.train.signals import Signals

T = TypeVar("T")


def shape_of(described: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, the same for experiments that may train together. `described`: an experiment as JSON."""
    return fingerprint(_shape(described))[:16]


def _shape(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What experiments that train together have in common."""
    for path in ("name", "data.seed"):
        described = _replaced(described, path.split("."), "any")
    if 0 <= described["seed"] < 2**31:  # others would be other keys as arrays of 32 bits
        described = {**described, "seed": "any"}
    for path in list(numbers(described)):
        described = _replaced(described, path.split("."), "any")
    return described


def train(members: Sequence[tuple[Experiment, Runtime, Path | None]]) -> list[Exception | None]:
    """Trains experiments of one shape together, each in the folder of its runtime as `launch.train` would alone, to
    within rounding. Each resumes from its own checkpoints; those that are complete are left alone.

    Args:
        members: an experiment, its runtime, and the Python file that it came from. The runtimes differ in their
            folders and in what they are called in W&B.

    Returns:
        For each what it ended with: None if it is complete.

    Raises:
        UserError: the experiments differ in more than seeds and numbers, or one cannot begin.
        Preempted: SIGTERM or Ctrl-C; all have saved.
    """
    described = [to_json(experiment) for experiment, _, _ in members]
    first, *others = map(_shape, described)
    for other in others:
        if differing := differences(first, other):
            may = sorted(numbers(described[0]), key=lambda path: path.count("."))
            raise UserError(
                f"these experiments cannot train together; they differ in {'; '.join(differing)}. What may differ are "
                f"seeds and {', '.join(may)}"
            )
    if not all(isinstance(runtime.distributed, Local) for _, runtime, _ in members):
        raise UserError("--runtime.distributed: runs that train together do so in one process; leave it out")
    ended: list[Exception | None] = [None] * len(members)
    found = [prepare(*member) for member in members]
    waiting = {i: ready for i, ready in enumerate(found) if ready is not None}
    with contextlib.ExitStack() as stack:
        fences = [stack.enter_context(held(ready.folder, ready.config)) for ready in waiting.values()]
        if waiting:
            for i, result in zip(waiting, _together(list(waiting.values()), fences), strict=True):
                ended[i] = result
    for i, ready in waiting.items():
        if ended[i] is None:
            print(f"done: {ready.folder}\n{next_steps(ready.folder, ready.experiment.model)}")
    return ended


def verdict(ended: Sequence[Exception | None]) -> None:
    """Raises one error for all runs that did not complete: that of a stop, else of a failure, else of a divergence."""
    errors = [error for error in ended if error is not None]
    for kind in (Preempted, Exception):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, Diverged):
                raise error
    if errors:
        raise Diverged(f"{len(errors)} of {len(ended)} runs diverged: {errors[0]}")


def _together(several: Sequence[Ready], fences: Sequence[Fence]) -> list[Exception | None]:
    first = several[0]
    choices = [settle(ready.runtime, ready.folder) for ready in several]
    compute = choices[0].compute
    if any(choice.compute != compute for choice in choices):
        raise UserError(
            f"{first.folder} and another of these runs began with different precision or kernels (compute.json); "
            "continue them one by one"
        )
    base = first.with_models(compute)
    experiments = [replace(ready.experiment, objective=base.objective) for ready in several]
    member = member_of(base, compute)
    objective = member(values_of(experiments)[0]).objective
    population = Population(
        member, values_of(experiments), frozen=objective.frozen, accumulate=base.accumulate,
        micro_tokens=compute.micro_tokens(base.model.width),
    )  # fmt: skip
    server = Server()
    runs = []
    with Signals() as signals:
        for i, (ready, choice) in enumerate(zip(several, choices, strict=True)):
            experiment, program = experiments[i], population.programs[i]
            parts = pieces(experiment, compute)
            built = Built(parts.model, parts.view, objective, program, compute)
            alone = job(
                ready._replace(experiment=experiment), built, choice,
                [f"one of {len(several)} runs that train as one program: times and speeds are those of a step of all"],
                among=len(several), server=server,
            )  # fmt: skip
            one = replace(alone, frozen=population.frozen, fence=fences[i])
            runs.append(training(one, population.held(i), signals))
        return population.train(runs)


def member_of(base: Experiment, compute: Compute) -> Callable[[Values], Member]:
    """What a run of a population computes, of its values (`values_of`): the experiment with these in their places."""
    objective = base.objective.build(base.model.build(compute, base.numerics))

    def member(values: Values) -> Member:
        experiment = base
        for path, value in values.items():
            if path != "seed":
                experiment = _replaced(experiment, path.split("."), value)
        parts = pieces(experiment, compute)
        return Member(
            parts.model.init, objective, parts.optimizer, parts.view, base.guard, parts.schedule, values["seed"]
        )

    return member


def values_of(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """For each: its seed, and the numbers by their paths in which they differ."""
    described = [to_json(experiment) for experiment in experiments]
    out: list[dict[str, Any]] = [{"seed": experiment.seed} for experiment in experiments]
    for path in numbers(described[0]):
        found = [_at(each, path) for each in described]
        if len(set(map(repr, found))) > 1:
            for values, number in zip(out, found, strict=True):
                values[path] = float(number)
    return out


def _at(described: Any, path: str) -> Any:
    """The value at a path of an experiment as JSON; None if there is none."""
    for key in path.split("."):
        described = described.get(key) if isinstance(described, Mapping) else None
    return described


def _replaced(value: T, keys: Sequence[str], new: Any) -> T:
    """A copy with what is at these keys replaced, of nested JSON objects or frozen dataclasses; the same if there is
    nothing at them."""
    key, *rest = keys
    if isinstance(value, Mapping):
        if key not in value:
            return value
        return {**value, key: _replaced(value[key], rest, new) if rest else new}  # type: ignore[return-value]
    if not dataclasses.is_dataclass(value):
        return value
    return replace(value, **{key: _replaced(getattr(value, key), rest, new) if rest else new})  # type: ignore[type-var]
