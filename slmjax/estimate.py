"""Means over independent units with their standard error: what training, `slmjax eval`, the model card and the
comparison of runs report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A figure and its standard error (nan if there is only one unit)."""

    value: float
    se: float


def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """sum(above) / sum(below) over independent units [n], with the standard error of the ratio estimator (Cochran 1977,
    section 6.3): sqrt(n / (n - 1) * sum (above - ratio * below)^2) / sum(below)."""
    n, total = len(above), below.sum()
    value = above.sum() / total
    spread = np.square(above - value * below).sum()
    return Estimate(float(value), float(np.sqrt(n / (n - 1) * spread) / total) if n > 1 else math.nan)


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of independent values [n] with its standard error, s / sqrt(n) with n - 1 degrees of freedom."""
    x = np.asarray(values, np.float64)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan)


def half_width(values: Sequence[float] | np.ndarray, level: float = 0.95) -> float:
    """Half the width of the confidence interval of the mean of independent values [n], by Student's t; nan for one
    value. Of paired runs, give the differences: what both have in common, such as a seed's data, cancels."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf((1 + level) / 2, n - 1)) * mean(values).se if n > 1 else math.nan
