"""How sure a fit is: the bootstrap over runs, and the profile of each parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from slmjax.scaling import starts
from slmjax.scaling.criterion import rise
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.fit import Fitted, named, predictions, refit, split
from slmjax.scaling.law import Additive, Allocation
from slmjax.scaling.runs import Runs

LEVEL = 0.9
"""Of intervals, unless another is asked for"""


@dataclass(frozen=True)
class Bootstrap:
    """Refits to runs drawn with replacement.

    Attributes:
        theta: [B, p].
        noise: residuals ln(loss) - ln(predicted), widened for the parameters that were fitted, to draw a new run's
            from, [n].
        level: of the intervals.
        seed: of the draws of a new run's noise.
    """

    fitted: Fitted
    theta: np.ndarray
    noise: np.ndarray
    level: float
    seed: int

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """Draws [B] of each parameter by name."""
        return named(self.fitted.law, self.theta)

    @cached_property
    def allocation(self) -> Allocation:
        return split(self.fitted.law, self.theta)

    def parameters(self) -> dict[str, Estimated]:
        return {name: from_draws(x, self.values[name], self.level) for name, x in self.fitted.values.items()}

    def predict(self, **columns: np.ndarray | float) -> Prediction:
        """Of the loss of one run at these quantities."""
        best = float(self.fitted.predict(columns)[0])
        draws = predictions(self.fitted.law, self.theta, columns)[:, 0]
        noise = np.random.default_rng(self.seed).choice(self.noise, len(draws))
        return Prediction(from_draws(best, draws, self.level), from_draws(best, draws * np.exp(noise), self.level))


@dataclass(frozen=True)
class Prediction:
    """Of a loss."""

    mean: Estimated
    """Of the law at that point: what many seeds would average to"""
    run: Estimated
    """Of one new run, whose loss also varies as the runs do around the fit"""

    def json(self) -> dict[str, object]:
        return {"mean": self.mean.json(), "run": self.run.json()}


def bootstrap(
    fitted: Fitted, draws: int = 300, *, level: float = LEVEL, seed: int = 0, cells: np.ndarray | None = None
) -> Bootstrap:
    """Refits to `draws` tables of as many runs, drawn with replacement, all at once. Each begins at the fit.

    Args:
        cells: runs of the same number are drawn together, [n]: seeds of one cell (`Runs.cells`).
    """
    n, p = len(fitted.residuals), len(fitted.theta)
    rng = np.random.default_rng(seed)
    cells = np.arange(n) if cells is None else cells
    many = int(cells.max()) + 1
    counts = rng.multinomial(many, np.full(many, 1 / many), size=draws)
    weights = counts[:, cells].astype(np.float64)
    start = np.tile(fitted.theta, (draws, 1))
    found = refit(fitted.law, fitted.columns, fitted.criterion, start, weights=weights)
    wider = math.sqrt(n / max(n - p, 1))
    return Bootstrap(fitted, found.theta, -fitted.residuals * wider, level, seed)


@dataclass(frozen=True)
class Profile:
    """The criterion's minimum over all other parameters, along one.

    Attributes:
        name: of the parameter.
        values: where it was held, [g], rising.
        objective: the minimum there, [g].
        threshold: values whose objective is at most this are within the interval.
        estimate: with the interval; an end that no value on that side exceeds the threshold before is infinite, or 0.
    """

    name: str
    values: np.ndarray
    objective: np.ndarray
    threshold: float
    estimate: Estimated


def profile(
    fitted: Fitted,
    name: str,
    *,
    level: float = LEVEL,
    points: int = 21,
    low: float | None = None,
    high: float | None = None,
) -> Profile:
    """The profile of one parameter, over values from `low` to `high` (as reported: A and not ln A): `points` of them,
    then as many where the interval ends.

    Each held value has starting points of its own by variable projection, besides the fit's, and its neighbours'
    solutions; so the profile also finds a better optimum than the fit's if there is one.

    Raises:
        KeyError: the law has no such parameter.
    """
    law = fitted.law
    index = [p.name for p in law.parameters].index(name)
    parameter, best = law.parameters[index], fitted.theta[index]
    held = _range(fitted, index, low, high, points)
    start = np.tile(fitted.theta, (len(held), 1))
    start[:, index] = held
    starts_of_its_own = [start]
    if isinstance(law, Additive) and name not in law.linear:
        loss = fitted.columns["loss"]
        projected = [
            starts.projected(law, fitted.columns, loss, fitted.criterion, keep=1, most=300, fixed={name: float(x)})
            for x in held
        ]
        starts_of_its_own.append(np.concatenate(projected))
    theta, objective = _along(fitted, index, held, starts_of_its_own)
    rises = rise(fitted.criterion, _raw(fitted), len(fitted.theta), level)
    inside = np.flatnonzero(objective <= min(float(objective.min()), fitted.objective) + rises)
    around = (inside[0] - 1, inside[-1] + 1) if len(inside) else (0, len(held) - 1)
    finer = np.linspace(held[max(around[0], 0)], held[min(around[1], len(held) - 1)], points + 2)[1:-1]
    finer = finer[~np.isin(finer, held)]
    between = np.stack([np.interp(finer, held, column) for column in theta.T], -1)
    _, objectives = _along(fitted, index, finer, [between])
    order = np.argsort(np.concatenate([held, finer]), kind="stable")
    held = np.concatenate([held, finer])[order]
    objective = np.concatenate([objective, objectives])[order]
    minimum = min(float(objective.min()), fitted.objective)
    threshold = minimum + rises
    reported = np.exp(held) if parameter.log else held
    inside = objective <= threshold
    ends = [_end(reported, objective, minimum, threshold, inside, side) for side in (-1, 1)]
    value = math.exp(best) if parameter.log else float(best)
    estimate = Estimated(value, ends[0], ends[1])
    if minimum < fitted.objective * (1 - 1e-6) - 1e-12:
        estimate = estimate.because("the fit is not the best one; its profile has a better one")
    elif math.isinf(ends[1]) or ends[0] == -math.inf:
        side = "above" if math.isinf(ends[1]) else "below"
        bound = f"{reported[-1] if side == 'above' else reported[0]:.3g}"
        estimate = estimate.because(f"its profile is flat: every value {side} the best one, to {bound}, fits as well")
    return Profile(name, reported, objective, threshold, estimate)


def _along(fitted: Fitted, index: int, held: np.ndarray, start: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The optimum with one parameter held at each of the values [g]: theta [g, p] and the criterion [g]. From several
    starting points [g, p] each, and then from the neighbours' optima."""
    free = np.arange(len(fitted.theta)) != index
    solved = [refit(fitted.law, fitted.columns, fitted.criterion, s, free=free) for s in start]
    which = np.argmin([s.objective for s in solved], 0)
    theta = np.stack([s.theta for s in solved])[which, np.arange(len(held))]
    objective = np.stack([s.objective for s in solved])[which, np.arange(len(held))]
    for shift in (1, -1):
        neighbour = np.roll(theta, shift, 0)
        neighbour[:, index] = held
        again = refit(fitted.law, fitted.columns, fitted.criterion, neighbour, free=free)
        better = again.objective < objective
        theta = np.where(better[:, None], again.theta, theta)
        objective = np.where(better, again.objective, objective)
    return theta, objective


def _raw(fitted: Fitted) -> np.ndarray:
    """The residuals of the criterion, [n]."""
    log_predicted, _ = fitted.law.log_loss(fitted.theta[None], fitted.columns)
    return fitted.criterion.residuals(log_predicted[0], fitted.columns["loss"])


def _range(fitted: Fitted, index: int, low: float | None, high: float | None, points: int) -> np.ndarray:
    """Values to hold a parameter at: evenly in its logarithm, with the fit's own among them."""
    parameter, best = fitted.law.parameters[index], float(fitted.theta[index])
    into = (lambda x: x) if parameter.log else math.log
    best = into(best)
    if parameter.log:
        least, most = best - math.log(20), best + math.log(20)
    else:
        least, most = best - math.log(8), best + math.log(8)
    bounds = (parameter.low, parameter.high) if parameter.log else (math.log(parameter.low), math.log(parameter.high))
    least = max(least, bounds[0]) if low is None else math.log(low)
    most = min(most, bounds[1]) if high is None else math.log(high)
    # Denser near the fit, where intervals of well determined parameters end.
    half = np.linspace(0, 1, points // 2 + 1)[1:] ** 2
    held = np.concatenate([best - half[::-1] * max(best - least, 0), [best], best + half * max(most - best, 0)])
    held = np.unique(held)
    return held if parameter.log else np.exp(held)


def _end(
    values: np.ndarray, objective: np.ndarray, minimum: float, threshold: float, inside: np.ndarray, side: int
) -> float:
    """Where the profile leaves the interval on one side: between the values held, the square root of its rise is nearly
    a straight line."""
    if not inside.any():
        return float(values[int(np.argmin(objective))])
    i = int(np.flatnonzero(inside)[0 if side < 0 else -1])
    j = i + side
    if not 0 <= j < len(values):
        return side * math.inf
    here, there, at = (math.sqrt(max(x - minimum, 0.0)) for x in (objective[i], objective[j], threshold))
    share = (at - here) / (there - here) if there > here else 1.0
    return float(values[i] + share * (values[j] - values[i]))


def replicate_spread(runs: Runs) -> Estimated:
    """The standard deviation of ln(loss) between seeds of one cell, pooled over cells, with its 90% interval
    (chi-squared); not identified if no cell has two seeds."""
    from scipy.special import chdtri

    logs, cells = np.log(runs["loss"]), runs.cells
    groups = [logs[cells == cell] for cell in np.unique(cells)]
    free = sum(len(group) - 1 for group in groups)
    if not free:
        return Estimated(math.nan, reason="no cell was run with two seeds")
    total = sum(float(np.sum((group - group.mean()) ** 2)) for group in groups)
    low, high = (math.sqrt(total / chdtri(free, q)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimated(math.sqrt(total / free), low, high)


class Misfit(NamedTuple):
    """What the residuals of a law are, beside the differences between seeds."""

    ratio: float
    """Standard deviation of the cells' means around the law, over what it would be if seeds alone made them differ"""
    chance: float
    """That it would be as large if the law were right (F test for lack of fit)"""


def lack_of_fit(runs: Runs, fitted: Fitted) -> Misfit | None:
    """None: no cell was run with two seeds, or there are no more cells than parameters.

    Draper and Smith 1998, Applied Regression Analysis, section 2.1.
    """
    from scipy.special import fdtrc

    cells = [runs.cells == cell for cell in np.unique(runs.cells)]
    logs, residuals = np.log(runs["loss"]), fitted.residuals
    within = sum(float(np.sum((logs[cell] - logs[cell].mean()) ** 2)) for cell in cells)
    around = sum(int(cell.sum()) * float(residuals[cell].mean()) ** 2 for cell in cells)
    free, more = len(runs) - len(cells), len(cells) - len(fitted.theta)
    if free < 1 or more < 1 or not within:
        return None
    f = (around / more) / (within / free)
    return Misfit(math.sqrt(f), float(fdtrc(more, free, f)))
