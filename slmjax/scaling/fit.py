"""A law fitted to runs: the search, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling import starts as searches
from slmjax.scaling.coupled import Coupled
from slmjax.scaling.criterion import HUBER, Criterion
from slmjax.scaling.law import Additive, Allocation, Columns, Law, allocation
from slmjax.scaling.solve import Solved, minimise

Method = Literal["projection", "grid", "full-grid"]


@dataclass(frozen=True)
class Fitted:
    """The best parameters of a law for a table of runs."""

    law: Law
    criterion: Criterion
    theta: np.ndarray
    """[p], logarithms where `Parameter.log` says so"""
    objective: float
    """The criterion's sum over the runs"""
    columns: Columns
    """Of the runs it was fitted to: those that the law reads, and the loss"""

    @cached_property
    def values(self) -> dict[str, float]:
        """Parameters by name: A and not ln A."""
        return {name: float(value[0]) for name, value in named(self.law, self.theta[None]).items()}

    @cached_property
    def residuals(self) -> np.ndarray:
        """ln(predicted) - ln(loss) of the runs, [n]."""
        return self.law.log_loss(self.theta[None], self.columns)[0][0] - np.log(self.columns["loss"])

    @cached_property
    def at_bounds(self) -> tuple[str, ...]:
        """Parameters that ended at the edge of where they were looked for."""
        return tuple(
            p.name
            for p, x in zip(self.law.parameters, self.theta, strict=True)
            if x <= p.low + 1e-9 or x >= p.high - 1e-9
        )

    def predict(self, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
        """The loss at quantities [n] that the law reads, by name."""
        return predictions(self.law, self.theta[None], columns)[0]

    @property
    def allocation(self) -> Allocation:
        """The best split of a budget; UserError if the law has no terms in both params and tokens."""
        return split(self.law, self.theta[None])


def fit(
    law: Law,
    columns: Columns,
    criterion: Criterion = HUBER,
    *,
    method: Method = "projection",
    start: np.ndarray | None = None,
) -> Fitted:
    """Fits a law to runs.

    Args:
        columns: what the law reads, and the loss (nats), each [n]; all positive.
        method: how an `Additive` law's search begins: by variable projection (Czech et al. 2026, arXiv:2603.22339),
            from a grid of 108 points, or from the 4500 of Hoffmann et al. (2022). From each, damped Newton steps with
            analytic derivatives lead to a local optimum; the best one is kept.
        start: starting points [B, p] instead.

    Raises:
        UserError: a column is missing, or there are fewer runs than parameters.
    """
    data = {name: np.asarray(columns[name], np.float64) for name in {*law.columns, "loss"} if name in columns}
    if missing := sorted({*law.columns, "loss"} - data.keys()):
        raise UserError(f"the law reads {', '.join(missing)}, which the table of runs does not have")
    loss = data["loss"]
    if len(loss) < len(law.parameters):
        names = ", ".join(p.name for p in law.parameters)
        raise UserError(f"{len(loss)} runs cannot fit {len(law.parameters)} parameters ({names}); add runs")
    if start is None and isinstance(law, Additive):
        if method == "projection":
            start = searches.projected(law, data, loss, criterion)
        else:
            start = searches.grid(law, thin=method == "grid")
    elif start is None:
        start = law.starts(data)
    found = refit(law, data, criterion, start)
    if not np.isfinite(found.objective).any():
        raise UserError("no starting point leads to a finite loss; are the columns in the units you mean?")
    best = int(np.nanargmin(found.objective))
    return Fitted(law, criterion, found.theta[best], float(found.objective[best]), data)


def refit(
    law: Law,
    columns: Columns,
    criterion: Criterion,
    start: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    free: np.ndarray | None = None,
) -> Solved:
    """Local optima from starting points [B, p]; with weights [B, n], such as how often a bootstrap draw has a run, each
    of its own problem."""
    loss = columns["loss"]

    def residuals(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_predicted, jacobian = law.log_loss(theta, columns)
        if not criterion.log:
            jacobian = jacobian * np.exp(log_predicted)[..., None]
        return criterion.residuals(log_predicted, loss), jacobian

    low, high = (np.asarray([getattr(p, side) for p in law.parameters]) for side in ("low", "high"))
    basis = law.basis(columns) if isinstance(law, Additive | Coupled) else None
    weights = np.ones(len(loss)) if weights is None else weights
    return minimise(residuals, start, criterion, weights=weights, low=low, high=high, free=free, basis=basis)


def named(law: Law, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters [B] by name from theta [B, p]: A and not ln A."""
    return {p.name: np.exp(x) if p.log else x for p, x in zip(law.parameters, theta.T, strict=True)}


def predictions(law: Law, theta: np.ndarray, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
    """Losses [B, n] of each theta [B, p] at quantities [n]."""
    given = np.broadcast_arrays(*(np.atleast_1d(np.asarray(columns[name], np.float64)) for name in law.columns))
    return np.exp(law.log_loss(theta, dict(zip(law.columns, given, strict=True)))[0])


def split(law: Law, theta: np.ndarray) -> Allocation:
    """The best split of a budget under each theta [B, p].

    Raises:
        UserError: the law has no terms in both params and tokens.
    """
    if not isinstance(law, Additive | Coupled):
        raise UserError("only a sum of power laws has a best split of a budget in closed form")
    return allocation(named(law, theta), law.inner if isinstance(law, Coupled) else law)
