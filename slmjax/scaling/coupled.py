"""A law whose terms add up before a power is taken of their sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from slmjax.scaling.criterion import HUBER
from slmjax.scaling.law import Additive, Columns, Term
from slmjax.scaling.quantity import Parameter
from slmjax.scaling.starts import projected

POWERS = (1.0, 0.5, 0.25, 0.15)
"""Of the sum, with which searches begin"""


@dataclass(frozen=True)
class Coupled:
    """L = E + (A / N^alpha + B / D^beta)^gamma, and likewise of any sum of terms.

    Kaplan et al. 2020 (arXiv:2001.08361, equation 1.5) without a floor. gamma = 1 is the sum itself. With gamma below
    1, the loss at a budget rises steeply around the best size while the best loss falls slowly with the budget: a sum
    has one pair of exponents for both. The best split of a budget is that of the sum.

    Attributes:
        inner: the sum, and its floor.
        power: the name of gamma.
    """

    inner: Additive
    power: str = "gamma"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    @cached_property
    def _parameters(self) -> tuple[Parameter, ...]:
        return (*self.inner.parameters, Parameter(self.power, low=0.01, high=3.0, starts=POWERS))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.inner.columns

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.inner.terms

    @property
    def floor(self) -> str:
        return self.inner.floor

    @property
    def linear(self) -> tuple[str, ...]:
        """The floor and the coefficients. The loss is linear in the floor alone."""
        return self.inner.linear

    def log_loss(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        names = [p.name for p in self.parameters]
        terms = self.inner.term_logs(theta[:, :-1], columns)
        gamma = theta[:, -1, None]
        total = np.logaddexp.reduce([np.broadcast_to(log, (len(theta), log.shape[-1])) for log, _ in terms])
        at_floor = np.broadcast_to(theta[:, names.index(self.floor), None], total.shape)
        value = np.logaddexp(at_floor, gamma * total)
        above = np.exp(gamma * total - value)
        jacobian = np.zeros((*total.shape, theta.shape[1]))
        jacobian[..., names.index(self.floor)] = np.exp(at_floor - value)
        jacobian[..., -1] = above * total
        for log, slopes in terms:
            share = above * gamma * np.exp(log - total)
            for name, slope in slopes.items():
                jacobian[..., names.index(name)] += share * slope
        return value, jacobian

    def starts(self, columns: Columns) -> np.ndarray:
        """Those of the sum, [B, p], changed so that each term keeps its asymptote under each of `POWERS`."""
        begin = projected(self.inner, columns, columns["loss"], HUBER)
        names = [p.name for p in self.inner.parameters]
        grown = {t.coefficient for t in self.terms} | {f.exponent for t in self.terms for f in t.factors}
        scaled = np.asarray([name in grown for name in names])
        rows = []
        for power in POWERS:
            theta = np.where(scaled, begin / power, begin)
            rows.append(np.column_stack([theta, np.full(len(theta), power)]))
        theta = np.concatenate(rows)
        low, high = (np.asarray([getattr(p, side) for p in self.parameters]) for side in ("low", "high"))
        return np.clip(theta, low, high)

    def basis(self, columns: Columns) -> np.ndarray:
        """That of the sum; gamma as it is."""
        out = np.eye(len(self.parameters))
        out[:-1, :-1] = self.inner.basis(columns)
        return out
