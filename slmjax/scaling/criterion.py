"""What a fit minimises: a sum over runs of a function of the residual."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slmjax.errors import UserError, positive


@dataclass(frozen=True)
class Criterion:
    """The sum (not the mean: a mean stops an optimizer early) over runs of Huber's function of the residual r:
    r^2 / 2 within `delta`, delta (|r| - delta / 2) beyond (Huber 1964; Hoffmann et al. 2022 take 1e-3).

    `delta=inf` is least squares. With `delta=0` the sum is of |r| (least absolute deviations).
    """

    delta: float = 1e-3
    log: bool = True
    """Whether r = ln(predicted) - ln(loss); if not, r = predicted - loss"""

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise UserError(f"delta: {self.delta} is not 0 or a positive number (inf gives least squares)")

    def each(self, residuals: np.ndarray) -> np.ndarray:
        """The contribution of each residual, of the same shape."""
        if self.delta == 0:
            return np.abs(residuals)
        return huber(residuals, self.delta)

    def residuals(self, log_predicted: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """[..., n] from ln(predicted) [..., n] and the losses [n]."""
        return log_predicted - np.log(loss) if self.log else np.exp(log_predicted) - loss

    def deltas(self) -> tuple[float, ...]:
        """The deltas that a solver goes through: |r| is approached through Huber's function, 10 times narrower each."""
        return (self.delta,) if self.delta > 0 else tuple(10.0**-k for k in range(3, 10))


HUBER = Criterion()
SQUARED = Criterion(delta=math.inf)
ABSOLUTE = Criterion(delta=0.0)


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    if math.isinf(delta):
        return 0.5 * size * size
    near = np.minimum(size, delta)
    return near * (size - 0.5 * near)


def rise(criterion: Criterion, residuals: np.ndarray, parameters: int, level: float) -> float:
    """By how much the criterion may rise above its minimum within a profile interval of this level.

    The robust likelihood-ratio statistic 2 (S - S_min) E[psi'] / E[psi^2], psi being the criterion's derivative, has a
    chi-squared distribution with 1 degree of freedom (Ronchetti 1982). E[psi^2] is corrected for the degrees of freedom
    that the fit has used.

    Args:
        residuals: of the best fit, [n].
        parameters: how many parameters were fitted.

    Returns:
        0 if no residual is left.
    """
    from scipy.special import chdtri  # scipy.stats takes seconds to import

    positive(level=level)
    n, size = len(residuals), np.abs(residuals)
    spare = max(n - parameters, 1) / n
    if math.isinf(criterion.delta):
        curvature, square = 1.0, float(np.mean(size**2))
    else:
        # The density of residuals near 0, from the inner third: exactly `parameters` of them vanish in a LAD fit.
        inner = max(criterion.delta, float(np.quantile(size, 1 / 3)))
        if inner == 0:
            return 0.0
        within = float(np.mean(size <= inner))
        slope = min(criterion.delta, inner) if criterion.delta else 1.0
        curvature = within / inner * slope
        square = float(np.mean(np.minimum(size, slope) ** 2)) if criterion.delta else 1.0
    return float(chdtri(1, 1 - level)) / 2 * square / spare / curvature
