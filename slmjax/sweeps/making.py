"""Functions that make cells from cells: grids, random and Sobol points, seeds, successive halving.

Each takes an experiment, a cell or several of either, so that they compose:
`seeds(grid(isoflop(...), **{"schedule.peak_lr": (1e-3, 2e-3)}), 3)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slmjax.config import override
from slmjax.errors import UserError
from slmjax.sweeps.cells import Cell, Cells, Rung, Tag, cells, tagged


def grid(base: Cells, **values: Any) -> tuple[Cell, ...]:
    """Every combination of values of fields. The last field varies fastest.

    Args:
        values: by the field's path, as on the command line: `grid(base, **{"schedule.peak_lr": (1e-3, 3e-3)})`.

    Raises:
        UserError: no such field (with the nearest), no values, or a value of the wrong type.
    """
    for path, several in values.items():
        if isinstance(several, str) or not isinstance(several, Sequence) or not several:
            raise UserError(f"grid: {path} is {several!r}; expected a tuple of values")
    combinations = itertools.product(*values.values())
    points = [dict(zip(values, point, strict=True)) for point in combinations]
    return tuple(_set(cell, point) for cell in cells(base) for point in points)


@dataclass(frozen=True)
class Uniform:
    """Numbers between two ends, evenly; whole numbers if both ends are."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"{type(self).__name__}({self.low}, {self.high}): the first must be below the second")

    def at(self, u: float) -> float:
        """The value at u in [0, 1)."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, self.low + int(u * (self.high - self.low + 1)))
        return self.low + u * (self.high - self.low)


@dataclass(frozen=True)
class LogUniform(Uniform):
    """Numbers between two positive ends, evenly in their logarithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise UserError(f"LogUniform({self.low}, {self.high}): both ends must be positive")

    def at(self, u: float) -> float:
        value = self.low * (self.high / self.low) ** u
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else value


def random(base: Cells, count: int, seed: int = 0, **ranges: Any) -> tuple[Cell, ...]:
    """`count` points drawn at random from ranges of fields, by the field's path.

    Args:
        ranges: a `Uniform`, a `LogUniform`, or a tuple of values to choose from.

    Raises:
        UserError: as `grid`.
    """
    return _points(base, np.random.default_rng(seed).random((count, len(ranges))), ranges)


def sobol(base: Cells, count: int, seed: int = 0, **ranges: Any) -> tuple[Cell, ...]:
    """`count` points of a scrambled Sobol sequence: more even than random ones. A power of 2 is best.

    Raises:
        UserError: as `grid`.

    References:
        Owen 1998, Scrambling Sobol' and Niederreiter-Xing points
    """
    from scipy.stats import qmc

    points = qmc.Sobol(max(1, len(ranges)), rng=seed).random_base2(math.ceil(math.log2(max(1, count))))
    return _points(base, points[:count], ranges)


def seeds(base: Cells, count: int, first: int = 0) -> tuple[Cell, ...]:
    """Replicates: each cell with `count` seeds from `first`, of the parameters and of the order of the data."""

    def each() -> Iterator[Cell]:
        for cell in cells(base):
            for seed in range(first, first + count):
                experiment = replace(cell.experiment, seed=seed)
                if hasattr(experiment.data, "seed"):
                    experiment = override(experiment, "data.seed", seed)
                yield tagged(cell, experiment, seed=seed)

    return tuple(each())


def horizons(base: Cells, steps: Sequence[int]) -> tuple[Cell, ...]:
    """Each cell for several numbers of steps. With a schedule that is flat before it decays (`WSD`), the longer runs go
    on from a checkpoint of the shorter ones before their decay, so that the stable phase is trained once; `slmjax
    sweep plan` finds out.

    Raises:
        UserError: `steps` do not rise.

    References:
        Hägele et al. 2024, Scaling laws and compute-optimal training beyond fixed training durations, arXiv:2405.18392
    """
    if not steps or list(steps) != sorted(set(steps)):
        raise UserError(f"horizons: steps are {tuple(steps)}; expected numbers that rise, such as (100, 300, 900)")
    return grid(base, steps=tuple(steps))


def halving(base: Cells, steps: Sequence[int], keep: float = 1 / 3, group: str = "halving") -> tuple[Cell, ...]:
    """Successive halving: every candidate is trained for the first number of steps; the share `keep` of them with the
    lowest loss for the next number, from the beginning, and so on. The others are dropped.

    Args:
        steps: of each round, rising.

    Raises:
        UserError: `steps` do not rise, or `keep` is not between 0 and 1.

    References:
        Jamieson and Talwalkar 2016, arXiv:1502.07943
    """
    if not steps or list(steps) != sorted(set(steps)):
        raise UserError(f"halving: steps are {tuple(steps)}; expected numbers that rise, such as (100, 300, 900)")
    if not 0 < keep < 1:
        raise UserError(f"halving: keep is {keep}; expected a share between 0 and 1")
    candidates = list(cells(base))
    best, out = len(candidates), []
    for number, many in enumerate(steps):
        for cell in candidates:
            rung = Rung(group=group, candidate=cell.hash, round=number, best=best)
            made = tagged(cell, replace(cell.experiment, steps=many), round=number)
            out.append(replace(made, rung=rung))
        best = max(1, math.ceil(best * keep - 1e-9))
    return tuple(out)


def _points(base: Cells, unit: np.ndarray, ranges: Mapping[str, Any]) -> tuple[Cell, ...]:
    """`unit`: points of the unit cube, [count, ranges]."""
    made = []
    for cell in cells(base):
        for point in unit:
            values = {path: _at(path, among, float(u)) for (path, among), u in zip(ranges.items(), point, strict=False)}
            made.append(_set(cell, values))
    return tuple(made)


def _at(path: str, among: Any, u: float) -> Any:
    if isinstance(among, Uniform):
        return among.at(u)
    if isinstance(among, str) or not isinstance(among, Sequence) or not among:
        raise UserError(f"{path} is {among!r}; expected Uniform(low, high), LogUniform(low, high) or a tuple of values")
    return among[min(int(u * len(among)), len(among) - 1)]


def _set(cell: Cell, values: Mapping[str, Any]) -> Cell:
    experiment = cell.experiment
    for path, value in values.items():
        experiment = override(experiment, path, value)
    return tagged(cell, experiment, **{path: _tag(value) for path, value in values.items()})


def _tag(value: Any) -> Tag:
    return value if isinstance(value, str | int | float | bool) else type(value).__name__
