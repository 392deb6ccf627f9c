"""Many robust nonlinear least-squares problems of one shape at once: bootstrap draws, starting points, profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slmjax.scaling.criterion import Criterion, huber

Residuals = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta [B, p] -> residuals [B, n] and their derivatives [B, n, p]"""

CHUNK = 4_000_000
"""Numbers of a Jacobian that are in memory at once"""


class Solved(NamedTuple):
    theta: np.ndarray
    """[B, p]"""
    objective: np.ndarray
    """[B]"""


def minimise(
    residuals: Residuals,
    start: np.ndarray,
    criterion: Criterion,
    *,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    free: np.ndarray | None = None,
    basis: np.ndarray | None = None,
    steps: int = 200,
) -> Solved:
    """A local minimum of sum_i weights_i criterion(r_i(theta)) from each starting point.

    Levenberg-Marquardt steps. Huber's function has no second derivative beyond delta; there a step counts a residual as
    iteratively reweighted least squares does (delta / |r|), the more the stronger the step is damped, so that undamped
    steps are Newton's on the quadratic piece at hand and end in finitely many.

    Args:
        start: [B, p], within the bounds.
        weights: [n], or [B, n] for problems that differ, such as bootstrap draws.
        low, high: bounds [p].
        free: which parameters may move, [p].
        basis: steps are taken in x with theta = basis x, [p, p]: coordinates that are less correlated. It is the
            identity in parameters that have bounds.
        steps: at most, for each of the criterion's deltas.
    """
    many, p = start.shape
    n = weights.shape[-1]
    chunk = max(1, CHUNK // (n * p))
    if many > chunk:
        bounds = {"low": low, "high": high, "free": free, "basis": basis, "steps": steps}
        weights = np.broadcast_to(weights, (many, n))
        slices = [slice(i, i + chunk) for i in range(0, many, chunk)]
        parts = [minimise(residuals, start[s], criterion, weights=weights[s], **bounds) for s in slices]
        return Solved(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    theta = np.clip(start, low, high)
    weights = np.broadcast_to(weights, (many, n))
    free = np.ones(p, bool) if free is None else free
    basis = np.eye(p) if basis is None else np.where(free[:, None], basis, np.eye(p))
    with np.errstate(over="ignore", invalid="ignore"):  # of steps that are then refused
        for delta in criterion.deltas():
            theta = _descend(residuals, theta, delta, weights, low, high, free, basis, steps)
        rest = residuals(theta)[0]
        return Solved(theta, np.sum(weights * criterion.each(rest), -1))


def _descend(
    residuals: Residuals,
    theta: np.ndarray,
    delta: float,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    free: np.ndarray,
    basis: np.ndarray,
    steps: int,
) -> np.ndarray:
    theta = theta.copy()
    moving = np.arange(len(theta))
    r, jacobian = residuals(theta)
    value = np.sum(weights * huber(r, delta), -1)
    damping = np.full(len(theta), 1e-2)
    small = np.zeros(len(theta), int)
    for _ in range(steps):
        step, gain = _step(theta[moving], r, jacobian, delta, weights[moving], damping, low, high, free, basis)
        proposed = np.clip(theta[moving] + step, low, high)
        new_r, new_jacobian = residuals(proposed)
        new = np.sum(weights[moving] * huber(new_r, delta), -1)
        better = new < value  # nan is not
        decrease = np.where(better, value - new, 0.0)
        theta[moving[better]] = proposed[better]
        r[better], jacobian[better] = new_r[better], new_jacobian[better]
        damping = np.where(better, damping / 8, damping * 5).clip(1e-14, 1e14)
        # Done when neither the model of the step nor the step itself still promises anything, several times in a row.
        tiny = (gain <= 1e-14 * value) | (better & (decrease <= 1e-13 * value)) | (damping > 1e12)
        small = np.where(tiny, small + 1, 0)
        value = np.where(better, new, value)
        left = (small < 3) & (value > 0)
        if not left.any():
            break
        if not left.all():
            moving, r, jacobian = moving[left], r[left], jacobian[left]
            value, damping, small = value[left], damping[left], small[left]
    return theta


def _step(
    theta: np.ndarray,
    r: np.ndarray,
    jacobian: np.ndarray,
    delta: float,
    weights: np.ndarray,
    damping: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    free: np.ndarray,
    basis: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The damped step [B, p] and the decrease that the quadratic model promises [B]."""
    size = np.abs(r)
    near = np.minimum(size, delta) if np.isfinite(delta) else size
    psi = np.sign(r) * near
    far = damping / (1 + damping)
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = np.where(size <= delta, 1.0, far[:, None] * near / size)
    local = jacobian @ basis
    gradient = np.einsum("bn,bnp->bp", weights * psi, local)
    hessian = np.swapaxes(local * (weights * curvature)[..., None], 1, 2) @ local
    scale = np.einsum("bn,bnp->bp", weights, local**2)
    scale *= np.where(np.isfinite(delta), np.mean(np.minimum(1.0, near / np.maximum(size, 1e-300)), -1), 1.0)[:, None]
    stuck = ~free | ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    diagonal = np.where(stuck, 1.0, damping[:, None] * scale + 1e-300)
    hessian = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, hessian)
    index = np.arange(theta.shape[1])
    hessian[:, index, index] += diagonal
    gradient = np.where(stuck, 0.0, gradient)
    unit = np.sqrt(np.maximum(hessian[:, index, index], 1e-300))
    scaled = hessian / unit[:, :, None] / unit[:, None, :]
    scaled[:, index, index] += 1e-15
    try:
        x = -np.linalg.solve(scaled, (gradient / unit)[..., None])[..., 0] / unit
    except np.linalg.LinAlgError:
        x = -gradient / unit**2
    return x @ basis.T, -np.sum(gradient * x, -1)
