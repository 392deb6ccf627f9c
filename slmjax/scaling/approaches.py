"""How the best size grows with compute, without a law of the loss: approaches 1 and 2 of Hoffmann et al. (2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.law import Allocation
from slmjax.scaling.runs import BITS, Runs

FEWEST = 3
"""Sizes that a parabola needs"""


@dataclass(frozen=True)
class Minimum:
    """The best size at one budget.

    Attributes:
        flops: the budget (geometric mean of its runs).
        params, loss: of the parabola's vertex; nan if it was rejected.
        parabola: loss = c0 + c1 x + c2 x^2 with x = ln(params / the geometric mean of the sizes), (c2, c1, c0).
        centre: that geometric mean.
        rejected: why; empty if it was not.
        runs: indices of its runs.
    """

    flops: float
    params: float
    loss: float
    parabola: tuple[float, float, float]
    centre: float
    rejected: str
    runs: np.ndarray


@dataclass(frozen=True)
class Frontier:
    """N* = scale_n C^a and D* = scale_d C^b: a line through ln N* and one through ln D* over ln C.

    Attributes:
        a, b: with intervals: not identified from fewer than three budgets.
        scale_n, scale_d: of the best params and tokens.
        minima: of each budget (approach 2), or nothing (approach 1).
        points: (C, N*) that the lines go through, [2, m].
    """

    a: Estimated
    b: Estimated
    scale_n: float
    scale_d: float
    minima: tuple[Minimum, ...]
    points: np.ndarray

    def params(self, flops: float) -> float:
        return self.scale_n * flops**self.a.value

    def tokens(self, flops: float) -> float:
        return self.scale_d * flops**self.b.value


def isoflop(runs: Runs, *, level: float = 0.9, draws: int = 300, seed: int = 0) -> Frontier:
    """Approach 2: a parabola of the loss in ln N at each budget, and a line through the vertices.

    A vertex at the edge of the sizes or beyond is rejected, and so is a parabola that opens downwards. Even without
    noise the result is biased, the more so the wider the grid and the more alpha and beta differ (`bias`).

    Args:
        draws: of the bootstrap over the runs of each budget.

    Raises:
        UserError: fewer than two budgets have a usable minimum; the message says why for each.
    """
    _comparable(runs)
    if not runs.budgets:
        raise UserError(
            f"{runs.source}: approach 2 needs runs of equal FLOPs, at least {FEWEST} sizes a budget; here FLOPs are "
            "spread without gaps; use approach 3"
        )
    minima = tuple(_minimum(runs, budget) for budget in runs.budgets)
    used = [minimum for minimum in minima if not minimum.rejected]
    if len(used) < 2:
        if all(np.isnan(m.parabola[0]) for m in minima):
            raise UserError(f"{runs.source}: approach 2 needs at least {FEWEST} sizes a budget; no budget has them")
        why = "; ".join(f"C={m.flops:.3g}: {m.rejected}" for m in minima if m.rejected) or "there is one budget"
        raise UserError(f"{runs.source}: approach 2 needs at least 2 budgets with a minimum inside their grid ({why})")
    flops, params = (np.asarray([getattr(m, name) for m in used]) for name in ("flops", "params"))
    frontier = _line(flops, params, runs.cost, minima)
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        drawn = [_minimum(runs, rng.choice(m.runs, len(m.runs))) for m in used]
        kept = [m for m in drawn if not m.rejected]
        if len(kept) > 1:
            again.append(np.polyfit(np.log([m.flops for m in kept]), np.log([m.params for m in kept]), 1)[0])
    return _with_interval(frontier, np.asarray(again), len(used), level)


def envelope(runs: Runs, *, points: int = 1500, level: float = 0.9) -> Frontier:
    """Approach 1: of each size, the loss over compute, interpolated between its horizons (monotone cubic in ln C); at
    `points` compute values evenly apart in their logarithm, the size of the lowest loss; a line through those.

    Compute values that fewer than three sizes reach are left out, and so are those where the smallest or the largest of
    them is best: the best one may lie beyond.

    Raises:
        UserError: fewer than three sizes have several horizons, or no size is best between others.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.special import stdtrit

    _comparable(runs)
    curves = []
    for size in np.unique(runs["params"]):
        mine = np.flatnonzero(runs["params"] == size)
        flops, which = np.unique(runs["flops"][mine], return_inverse=True)
        if len(flops) > 1:
            loss = np.bincount(which, runs["loss"][mine]) / np.bincount(which)
            curves.append((size, np.log(flops), np.log(loss)))
    if len(curves) < FEWEST:
        raise UserError(
            f"{runs.source}: approach 1 needs at least {FEWEST} sizes with several token horizons each; "
            f"it has {len(curves)}"
        )
    grid = np.linspace(min(c[1][0] for c in curves), max(c[1][-1] for c in curves), points)
    losses = np.full((len(curves), points), math.inf)
    for row, (_, logs, loss) in zip(losses, curves, strict=True):
        inside = (grid >= logs[0]) & (grid <= logs[-1])
        row[inside] = PchipInterpolator(logs, loss)(grid[inside])
    best = losses.argmin(0)
    reach = np.isfinite(losses)
    first, last = reach.argmax(0), len(curves) - 1 - reach[::-1].argmax(0)
    inner = (reach.sum(0) >= FEWEST) & (best > first) & (best < last)
    sizes = np.asarray([size for size, _, _ in curves])[best[inner]]
    if len(np.unique(sizes)) < 2:
        raise UserError(
            f"{runs.source}: approach 1 finds no two sizes that are best between others; add sizes or horizons"
        )
    frontier = _line(np.exp(grid[inner]), sizes, runs.cost, ())
    # The values of compute are not independent, the sizes are: the error is that of leaving out one size at a time.
    a = frontier.a.value
    several = np.unique(sizes)
    if len(several) < FEWEST + 1:
        reason = f"only {len(several)} sizes are best anywhere; a slope's error needs {FEWEST + 1}"
        return replace(frontier, a=Estimated(a, reason=reason), b=Estimated(1 - a, reason=reason))
    logs = np.log(sizes)
    slopes = np.asarray([np.polyfit(grid[inner][sizes != size], logs[sizes != size], 1)[0] for size in several])
    se = math.sqrt((len(several) - 1) / len(several) * float(np.sum((slopes - slopes.mean()) ** 2)))
    half = float(stdtrit(len(several) - 2, (1 + level) / 2)) * se
    b = Estimated(1 - a, 1 - a - half, 1 - a + half, se)
    return replace(frontier, a=Estimated(a, a - half, a + half, se), b=b)


@dataclass(frozen=True)
class Bias:
    """What an approach makes of a law without noise, on the very cells of the runs.

    Attributes:
        a: its exponent minus the law's.
        params, tokens: its N* and D* at `flops`, relative to the law's, minus 1.
    """

    flops: float
    a: float
    params: float
    tokens: float


def bias(runs: Runs, loss: np.ndarray, truth: Allocation, flops: float) -> Bias:
    """Of approach 2 at a budget: the runs' losses replaced by those of a law (Czech et al. 2026, arXiv:2603.22339).

    Args:
        loss: of the law at the runs, [n].
        truth: the law's own best split.

    Raises:
        UserError: as `isoflop`.
    """
    columns: Mapping[str, np.ndarray] = {**runs.columns, "loss": loss}
    found = isoflop(Runs(columns, source=runs.source), draws=0)
    n, d = (float(np.ravel(x)[0]) for x in (truth.params(flops, runs.cost), truth.tokens(flops, runs.cost)))
    a = found.a.value - float(np.ravel(truth.a)[0])
    return Bias(flops, a, found.params(flops) / n - 1, found.tokens(flops) / d - 1)


def _comparable(runs: Runs) -> None:
    """Raises UserError if runs differ in more than params and tokens."""
    other = [name for name in BITS if runs.varies(name)] + (["unique_tokens"] if runs.repeats else [])
    if other:
        raise UserError(
            f"{runs.source}: approaches 1 and 2 compare runs that differ in params and tokens alone; here {other[0]} "
            "differs too"
        )


def _minimum(runs: Runs, budget: np.ndarray) -> Minimum:
    flops = math.exp(float(np.mean(np.log(runs["flops"][budget]))))
    sizes, loss = np.log(runs["params"][budget]), runs["loss"][budget]
    centre = float(sizes.mean())
    nothing = (math.nan, math.nan, math.nan)
    if (many := len(np.unique(sizes))) < FEWEST:
        return Minimum(flops, math.nan, math.nan, nothing, math.exp(centre), f"{many} sizes; it needs {FEWEST}", budget)
    c2, c1, c0 = (float(c) for c in np.polyfit(sizes - centre, loss, 2))
    rejected, vertex = "", math.nan
    if c2 <= 0:
        rejected = "the parabola opens downwards"
    else:
        vertex = centre - c1 / (2 * c2)
        if not sizes.min() < vertex < sizes.max():
            end = "smaller" if vertex <= sizes.min() else "larger"
            rejected, vertex = f"its minimum is at the edge of its sizes; add {end} ones", math.nan
    best = c0 - c1 * c1 / (4 * c2) if not rejected else math.nan
    return Minimum(flops, math.exp(vertex), best, (c2, c1, c0), math.exp(centre), rejected, budget)


def _line(flops: np.ndarray, params: np.ndarray, cost: float, minima: tuple[Minimum, ...]) -> Frontier:
    a, log_scale = np.polyfit(np.log(flops), np.log(params), 1)
    scale = math.exp(log_scale)
    points = np.stack([flops, params])
    return Frontier(Estimated(float(a)), Estimated(float(1 - a)), scale, 1 / (cost * scale), minima, points)


def _with_interval(frontier: Frontier, draws: np.ndarray, many: int, level: float) -> Frontier:
    a, b = from_draws(frontier.a.value, draws, level), from_draws(frontier.b.value, 1 - draws, level)
    if many < FEWEST:
        reason = "a line through two points has no error; add a third budget"
        a, b = a.because(reason), b.because(reason)
    return replace(frontier, a=a, b=b)
