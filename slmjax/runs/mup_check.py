"""Whether a parametrisation does what it promises: activations keep their size as a model grows (the coordinate check),
and so does the best learning rate. Yang et al. 2022, arXiv:2203.03466, sections 6 and D.1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from slmjax.config import Experiment
from slmjax.errors import UserError
from slmjax.models.multipliers import decoder
from slmjax.models.parametrisation import Parametrisation
from slmjax.models.resizing import resized
from slmjax.runs.mup_runs import Trained, activations, trainer
from slmjax.types import Batch

LAST = 0.2
"""Share of the steps, at the end, over which a training's loss is the mean"""


class Size(NamedTuple):
    """Of a model."""

    width: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained."""

    widths: tuple[int, ...]
    """Of models with the fewest layers"""
    depths: tuple[int, ...]
    """Of models with the smallest width"""
    rates: tuple[float, ...]
    """Peak learning rates, ascending"""
    steps: int
    """Of each training whose loss is compared"""
    few: int
    """Steps after which activations are measured, at the middle rate; more than those of the warm-up"""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "rates"):
            given = getattr(self, name)
            if not given or list(given) != sorted(set(given)) or given[0] <= 0:
                raise UserError(f"--{name} {' '.join(map(str, given))}: expected ascending positive numbers")
        if len(self.widths) == len(self.depths) == 1:
            raise UserError("--widths and --depths are one number each; give several of at least one of them")
        if not 1 <= self.few <= self.steps:
            raise UserError(f"--few is {self.few}; expected 1 to --steps, {self.steps}")

    @property
    def base(self) -> Size:
        return Size(self.widths[0], self.depths[0])

    @property
    def axes(self) -> dict[str, tuple[Size, ...]]:
        """What grows -> the sizes of models, where there are several."""
        wide = tuple(Size(width, self.base.layers) for width in self.widths)
        deep = tuple(Size(self.base.width, layers) for layers in self.depths)
        return {name: sizes for name, sizes in (("width", wide), ("layers", deep)) if len(sizes) > 1}

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(size for sizes in self.axes.values() for size in sizes))


class Coordinates(NamedTuple):
    """Root mean squares of a model's activations after a few steps, by name."""

    size: Mapping[str, float]
    change: Mapping[str, float]
    """Of the difference from what they were before the first step"""


class Measured(NamedTuple):
    """What was found of one parametrisation."""

    coordinates: Mapping[Size, Coordinates]
    losses: Mapping[Size, tuple[float, ...]]
    """For each learning rate; infinite if the training diverged"""


def base_of(experiment: Experiment, plan: Plan) -> Experiment:
    """The experiment with a base model of the smallest size: its own, or the base of its own, made smaller."""
    initial = experiment.model.initial
    model = decoder("model", initial.base if isinstance(initial, Parametrisation) else experiment.model)
    model = resized(model, width=plan.base.width, layers=plan.base.layers)
    warmup = min(experiment.schedule.warmup_steps, plan.steps // 10)
    schedule = replace(experiment.schedule, peak_lr=plan.rates[len(plan.rates) // 2], warmup_steps=warmup)
    return replace(experiment, model=model, schedule=schedule, steps=plan.steps)


def measure(
    base: Experiment,
    parametrisation: Parametrisation,
    plan: Plan,
    batches: Sequence[Batch],
    say: Callable[[str], None],
    known: Measured = Measured({}, {}),  # noqa: B008
) -> Measured:
    """Trains a model of each size at each learning rate.

    Args:
        batches: of all trainings, `plan.steps` or more.
        known: sizes that need not be measured again.
    """
    coordinates, losses = dict(known.coordinates), dict(known.losses)
    name = type(parametrisation).__name__
    for size in plan.sizes:
        if size in losses:
            continue
        model = parametrisation.model(resized(decoder("model", base.model), width=size.width, layers=size.layers))
        experiment = replace(base, model=model)
        train = trainer(experiment)
        coordinates[size] = _coordinates(experiment, train, batches[: plan.few])
        found = [train(rate, batches[: plan.steps]).losses for rate in plan.rates]
        losses[size] = tuple(_loss(x) for x in found)
        shown = " ".join(f"{x:.3f}" for x in losses[size])
        say(f"{name}, width {size.width}, {size.layers} layers: losses {shown}")
    return Measured(coordinates, losses)


def _coordinates(
    experiment: Experiment, train: Callable[[float, Sequence[Batch]], Trained], batches: Sequence[Batch]
) -> Coordinates:
    measured = activations(decoder("model", experiment.model))
    rows = jax.tree.map(lambda x: np.asarray(x)[:2], batches[0])
    rate = experiment.schedule.peak_lr
    before, after = (measured(train(rate, steps).params, rows) for steps in ((), batches))
    return Coordinates(
        {name: _rms(x) for name, x in after.items()}, {name: _rms(x - before[name]) for name, x in after.items()}
    )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _loss(losses: np.ndarray) -> float:
    """The mean over the last steps; infinite if that is no number, or no better than the first loss."""
    last = float(np.mean(losses[-max(1, round(LAST * len(losses))) :]))
    return last if math.isfinite(last) and last < losses[0] else math.inf


def slopes(measured: Measured, sizes: Sequence[Size], axis: str) -> dict[str, tuple[float, float]]:
    """For each activation the powers of the width (or depth) with which its size and its change grow, by least squares
    over the logarithms."""
    x = np.log([getattr(size, axis) for size in sizes])

    def slope(values: list[float]) -> float:
        return float(np.polyfit(x, np.log(np.maximum(values, 1e-30)), 1)[0])

    found = [measured.coordinates[size] for size in sizes]
    return {
        name: (slope([each.size[name] for each in found]), slope([each.change[name] for each in found]))
        for name in found[0].size
    }


def best(measured: Measured, sizes: Sequence[Size]) -> list[int | None]:
    """For each size the index of the best learning rate; None if every training diverged."""
    out = []
    for size in sizes:
        losses = measured.losses[size]
        out.append(int(np.argmin(losses)) if np.isfinite(losses).any() else None)
    return out


def moved(found: Sequence[int | None]) -> float:
    """Over how many steps of the grid the best learning rate moves; infinite if a size has none."""
    there = [i for i in found if i is not None]
    return max(there) - min(there) if len(there) == len(found) else math.inf


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a measurement says of a parametrisation along one axis."""

    name: str
    axis: str
    sizes: tuple[Size, ...]
    slopes: Mapping[str, tuple[float, float]]
    best: tuple[int | None, ...]
    tolerance: float
    most: int
    """Steps of the grid that the best learning rate may move"""

    @property
    def uneven(self) -> list[str]:
        """Activations that grow with the axis, or whose change does not keep its size."""
        return [
            name
            for name, (size, change) in self.slopes.items()
            if size > self.tolerance or abs(change) > self.tolerance or not math.isfinite(size + change)
        ]

    @property
    def moved(self) -> float:
        return moved(self.best)

    @property
    def flat(self) -> bool:
        return not self.uneven

    @property
    def transfers(self) -> bool:
        return self.moved <= self.most

    @property
    def at_edge(self) -> bool:
        """Whether a best learning rate may lie outside of the grid."""
        return any(i in (None, 0, self.most_index) for i in self.best)

    most_index: int = 0
    """Index of the highest learning rate"""


def verdicts(name: str, measured: Measured, plan: Plan, tolerance: float, most: int = 1) -> list[Verdict]:
    """One for each axis along which there are several sizes."""
    return [
        Verdict(
            name=name,
            axis=axis,
            sizes=sizes,
            slopes=slopes(measured, sizes, axis),
            best=tuple(best(measured, sizes)),
            tolerance=tolerance,
            most=most,
            most_index=len(plan.rates) - 1,
        )
        for axis, sizes in plan.axes.items()
    ]
