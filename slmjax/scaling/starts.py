"""Where a fit begins: by variable projection, or from a grid."""

from __future__ import annotations

import itertools
import math

import numpy as np

from slmjax.scaling.criterion import Criterion
from slmjax.scaling.law import Additive, Columns

MOST = 3000
"""Points of a grid over exponents"""


def projected(
    law: Additive,
    columns: Columns,
    loss: np.ndarray,
    criterion: Criterion,
    *,
    keep: int = 12,
    most: int = MOST,
    fixed: dict[str, float] | None = None,
) -> np.ndarray:
    """Starting points [keep, p] by variable projection (Golub & Pereyra 1973): on a grid over the exponents, the floor
    and the coefficients follow by non-negative least squares, reweighted for the criterion. The best point of the grid,
    and the next best that lie apart.

    Args:
        most: points of the grid, about.
        fixed: values of some parameters that are not linear, which the grid keeps.
    """
    names = [p.name for p in law.parameters]
    inner = [p for p in law.parameters if p.name not in law.linear]
    each = max(3, int(most ** (1 / max(len(inner) - len(fixed or {}), 1))))
    axes = [np.asarray([(fixed or {})[p.name]] if p.name in (fixed or {}) else _thin(p.starts, each)) for p in inner]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], -1)
    theta = np.zeros((len(grid), len(names)))
    for column, p in enumerate(inner):
        theta[:, names.index(p.name)] = grid[:, column]
    theta, value = solve_linear(law, theta, columns, loss, criterion)
    order = np.argsort(value, kind="stable")
    places = np.stack([index.ravel() for index in np.meshgrid(*map(_places, axes), indexing="ij")], -1)
    chosen: list[int] = []
    for i in order:
        if not np.isfinite(value[i]) or len(chosen) == keep:
            break
        if all(np.abs(places[i] - places[j]).max() > 1 for j in chosen):
            chosen.append(int(i))
    return theta[chosen]


def solve_linear(
    law: Additive, theta: np.ndarray, columns: Columns, loss: np.ndarray, criterion: Criterion, rounds: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """The floor and the coefficients that are best with each theta's other parameters: theta [B, p] with them, and the
    criterion [B].

    In ln L, residuals are about (predicted - loss) / loss, of which least squares is linear in these parameters;
    Huber's function by reweighting.
    """
    index = [next(i for i, p in enumerate(law.parameters) if p.name == name) for name in law.linear]
    theta = theta.copy()
    theta[:, index] = 0.0
    logs = [np.zeros((len(theta), len(loss))), *(log for log, _ in law.term_logs(theta, columns))]
    logs = [np.broadcast_to(log, (len(theta), len(loss))) for log in logs]
    shift = np.stack([log.max(-1) for log in logs], -1)  # each column's largest entry becomes 1
    matrix = np.stack([np.exp(log - s[:, None]) for log, s in zip(logs, shift.T, strict=True)], -1)
    scale = loss if criterion.log else np.ones_like(loss)
    matrix, target = matrix / scale[:, None], loss / scale
    weights = np.ones((len(theta), len(loss)))
    for _ in range(rounds if criterion.delta < math.inf else 1):
        solution = nonnegative(matrix, target, weights)
        size = np.abs((matrix @ solution[..., None])[..., 0] - target)
        weights = 1 / np.maximum(size, max(criterion.delta, 1e-6))
    # A coefficient of 0 has no logarithm; a thousandth of the loss lets the search decide again.
    floor = 1e-3 * float(loss.min())
    theta[:, index] = np.log(np.maximum(solution, floor)) - shift
    log_predicted, _ = law.log_loss(theta, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        return theta, criterion.each(criterion.residuals(log_predicted, loss)).sum(-1)


def nonnegative(matrix: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares with solutions >= 0, of many small systems at once: [B, m] from matrices [B, n, m], one
    target [n] and weights [B, n]. Every set of nonzero variables is tried: m is at most 5."""
    weighted = matrix * weights[..., None]
    gram = np.swapaxes(weighted, 1, 2) @ matrix
    right = np.einsum("bnm,n->bm", weighted, target)
    many, m = right.shape
    best, lowest = np.zeros((many, m)), np.zeros(many)  # of x^T G x - 2 x^T r, which is 0 for x = 0
    diagonal = np.einsum("bmm->bm", gram)
    for size in range(1, m + 1):
        for chosen in itertools.combinations(range(m), size):
            at = list(chosen)
            part = gram[:, at][:, :, at].copy()
            # As little as keeps columns that are nearly alike from being singular.
            part[:, range(size), range(size)] += 1e-13 * diagonal[:, at] + 1e-300
            x = np.linalg.solve(part, right[:, at, None])[..., 0]
            value = -np.sum(x * right[:, at], -1)
            better = (x >= 0).all(-1) & (value < lowest)
            lowest = np.where(better, value, lowest)
            best[better] = 0.0
            best[np.ix_(better, at)] = x[better]
    return best


def grid(law: Additive, thin: bool = True) -> np.ndarray:
    """The starting points of Hoffmann et al. (2022), approach 3: exponents {0, .5 .. 2}, ln E {-1, -.5 .. 1}, ln of
    coefficients {0, 5 .. 25}. 4500 for a law of two terms; `thin` keeps those 108 of them from which the same optimum
    is reached: exponents {.5, 1}, ln E {-.5, 0, .5}, and the coefficients that put a term within sight of the loss.
    """
    axes = []
    for p in law.parameters:
        if p.name == law.floor:
            axes.append((-0.5, 0.0, 0.5) if thin else (-1.0, -0.5, 0.0, 0.5, 1.0))
        elif p.name in law.linear:
            axes.append((5.0, 10.0, 15.0) if thin else (0.0, 5.0, 10.0, 15.0, 20.0, 25.0))
        elif p.starts and p.log:
            axes.append(_thin(p.starts, 3))
        else:
            axes.append((0.5, 1.0) if thin else (0.0, 0.5, 1.0, 1.5, 2.0))
    return np.asarray(list(itertools.product(*axes)), np.float64)


def _thin(values: tuple[float, ...], most: int) -> np.ndarray:
    if len(values) <= most:
        return np.asarray(values)
    return np.asarray(values)[np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def _places(axis: np.ndarray) -> np.ndarray:
    return np.arange(len(axis))
