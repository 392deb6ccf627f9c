"""A figure with its interval, or why the runs cannot tell it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimated:
    """A figure that was estimated from runs.

    Attributes:
        value: the best estimate.
        low, high: percentiles of the bootstrap, or the ends of a profile interval; infinite where it has none.
        se: the standard error.
        reason: why the runs do not identify it; empty if they do. Report that in its place and not the number.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    se: float = math.nan
    reason: str = ""

    @property
    def identified(self) -> bool:
        return not self.reason

    def because(self, reason: str) -> Estimated:
        """The same, not identified for this reason, unless there is one already."""
        return self if self.reason else Estimated(self.value, self.low, self.high, self.se, reason)

    def json(self) -> dict[str, object]:
        """For `--json`: no number where the runs give none."""
        if self.reason:
            return {"identified": False, "reason": self.reason}
        return {name: _finite(getattr(self, name)) for name in ("value", "low", "high", "se")}

    def __str__(self) -> str:
        if self.reason:
            return f"not identified: {self.reason}"
        interval = "" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


def from_draws(value: float, draws: np.ndarray, level: float) -> Estimated:
    """With the percentile interval of bootstrap draws [B] (those that are not finite left out) and their spread."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Estimated(value)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    se = float(draws.std(ddof=1)) if len(draws) > 1 else math.nan
    return Estimated(value, float(low), float(high), se)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
