"""Means over independent units with their standard error: what training, `slmjax eval` and the model card report."""

from __future__ import annotations

import math
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
