"""Laws of the loss: a floor and a sum of power-law terms, composed of values.

L = E + sum over terms of coefficient * product over factors of quantity^(+-exponent). Chinchilla's law (Hoffmann et al.
2022) is E + A / N^alpha + B / D^beta. Parameters of the same name are one parameter: two terms with the exponent "eta"
share it. What a run's quantities are made of is in `quantity.py`; `Law` is what the fitter needs to know of any law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling.quantity import PARAMETERS, TOKENS, Parameter, Quantity

Columns = Mapping[str, np.ndarray]
"""Columns of a table of runs by name, each [n]"""

EXPONENTS = tuple(float(x) for x in np.geomspace(0.03, 3.0, 28))


@runtime_checkable
class Law(Protocol):
    """Any law of the loss of a run."""

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        ...

    def log_loss(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """ln(predicted) [B, n] and its derivatives [B, n, p], of parameters theta [B, p] (logarithms where
        `Parameter.log` says so)."""
        ...

    def starts(self, columns: Columns) -> np.ndarray:
        """Where searches begin, [B, p]; `columns` have the loss."""
        ...


@dataclass(frozen=True)
class Factor:
    """A quantity to the power of minus its exponent, or of plus its exponent."""

    quantity: Quantity
    exponent: str
    grows: bool = False
    """Whether the loss grows with the quantity"""


@dataclass(frozen=True)
class Term:
    """coefficient * product of factors."""

    coefficient: str
    factors: tuple[Factor, ...]


def power(quantity: Quantity, coefficient: str, exponent: str) -> Term:
    """coefficient / quantity^exponent."""
    return Term(coefficient, (Factor(quantity, exponent),))


@dataclass(frozen=True)
class Additive:
    """L = floor + the sum of the terms.

    Attributes:
        floor: the name of the loss that no model goes below, by convention E.
    """

    terms: tuple[Term, ...]
    floor: str = "E"
    exponents: tuple[float, float] = (1e-3, 10.0)
    """Between which every exponent is looked for"""

    def __post_init__(self) -> None:
        coefficients = [term.coefficient for term in self.terms]
        if not self.terms or len({*coefficients, self.floor}) <= len(coefficients):
            raise UserError(f"coefficients of a law: {coefficients} and {self.floor!r}; each needs a name of its own")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The floor, the coefficients, the exponents, then what the quantities need."""
        return self._parameters

    @cached_property
    def _parameters(self) -> tuple[Parameter, ...]:
        found = {self.floor: Parameter(self.floor, log=True)}
        found |= {term.coefficient: Parameter(term.coefficient, log=True) for term in self.terms}
        factors = [factor for term in self.terms for factor in term.factors]
        low, high = self.exponents
        found |= {f.exponent: Parameter(f.exponent, low=low, high=high, starts=EXPONENTS) for f in factors}
        found |= {p.name: p for f in factors for p in f.quantity.parameters}
        return tuple(found.values())

    @cached_property
    def _index(self) -> dict[str, int]:
        return {p.name: i for i, p in enumerate(self.parameters)}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c for t in self.terms for f in t.factors for c in f.quantity.columns))

    @property
    def linear(self) -> tuple[str, ...]:
        """The parameters in which the loss is linear: the floor and the coefficients."""
        return (self.floor, *(term.coefficient for term in self.terms))

    def term_logs(self, theta: np.ndarray, columns: Columns) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """ln of each term [B, n], and its derivatives by the parameters' names."""
        out = []
        for term in self.terms:
            total = theta[:, self._index[term.coefficient], None]
            slopes: dict[str, np.ndarray] = {term.coefficient: np.ones_like(total)}
            for factor in term.factors:
                sign = 1.0 if factor.grows else -1.0
                inner = [theta[:, self._index[p.name], None] for p in factor.quantity.parameters]
                log, by = factor.quantity.log(inner, columns)
                exponent = sign * theta[:, self._index[factor.exponent], None]
                total = total + exponent * log
                slopes[factor.exponent] = slopes.get(factor.exponent, 0.0) + sign * log
                for p, slope in zip(factor.quantity.parameters, by, strict=True):
                    slopes[p.name] = slopes.get(p.name, 0.0) + exponent * slope
            out.append((total, slopes))
        return out

    def log_loss(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        terms = self.term_logs(theta, columns)
        n = len(columns[self.columns[0]])
        floor = np.broadcast_to(theta[:, self._index[self.floor], None], (len(theta), n))
        logs = [floor, *(log for log, _ in terms)]
        top = np.maximum.reduce(logs)
        parts = [np.exp(log - top) for log in logs]
        total = np.add.reduce(parts)
        jacobian = np.zeros((len(theta), n, theta.shape[1]))
        jacobian[..., self._index[self.floor]] = parts[0] / total
        for part, (_, slopes) in zip(parts[1:], terms, strict=True):
            share = part / total
            for name, slope in slopes.items():
                jacobian[..., self._index[name]] += share * slope
        return top + np.log(total), jacobian

    def starts(self, columns: Columns) -> np.ndarray:
        """One point, amid what is usual; `starts.projected` finds better ones."""
        middle = [p.starts[len(p.starts) // 2] if p.starts else 0.0 for p in self.parameters]
        return np.asarray([middle])

    def basis(self, columns: Columns) -> np.ndarray:
        """Coordinates x with theta = basis x, in which ln(coefficient) is that of the term at the runs' geometric mean:
        nearly uncorrelated with the exponents, while ln A and alpha are almost collinear."""
        out = np.eye(len(self.parameters))
        for term in self.terms:
            for f in term.factors:
                inner = [np.full((1, 1), p.starts[0]) for p in f.quantity.parameters]
                mean = float(np.mean(f.quantity.log(inner, columns)[0]))
                out[self._index[term.coefficient], self._index[f.exponent]] += -mean if f.grows else mean
        return out


def chinchilla(parameters: Quantity = PARAMETERS, tokens: Quantity = TOKENS) -> Additive:
    """E + A / N^alpha + B / D^beta (Hoffmann et al. 2022)."""
    return Additive((power(parameters, "A", "alpha"), power(tokens, "B", "beta")))


def tied(parameters: Quantity = PARAMETERS, tokens: Quantity = TOKENS) -> Additive:
    """E + A / N^eta + B / D^eta: the best N and D grow in proportion (Gadre et al. 2024)."""
    return Additive((power(parameters, "A", "eta"), power(tokens, "B", "eta")))


class Allocation(NamedTuple):
    """What is best at a budget: N* = scale (C / cost)^a and D* = (C / cost)^b / scale, with C = cost N D."""

    scale: np.ndarray
    """G = (alpha A / (beta B))^(1 / (alpha + beta)), [B]"""
    a: np.ndarray
    """beta / (alpha + beta): N* ~ C^a"""
    b: np.ndarray
    """alpha / (alpha + beta): D* ~ C^b"""

    def params(self, flops: float | np.ndarray, cost: float = 6.0) -> np.ndarray:
        return self.scale * (np.asarray(flops) / cost) ** self.a

    def tokens(self, flops: float | np.ndarray, cost: float = 6.0) -> np.ndarray:
        return (np.asarray(flops) / cost) ** self.b / self.scale


def allocation(values: Mapping[str, np.ndarray | float], law: Additive) -> Allocation:
    """The best split of a budget by a law of two terms, one in parameters and one in tokens; of data that does not
    repeat, in full precision.

    Args:
        values: parameters of the law by name (A and not ln A), each a number or [B].

    Raises:
        UserError: the law has no such two terms.
    """
    by_column: dict[str, Term] = {}
    for term in law.terms:
        if len(term.factors) == 1 and not term.factors[0].grows:
            by_column.setdefault(term.factors[0].quantity.columns[0], term)
    if not {"params", "tokens"} <= by_column.keys():
        raise UserError("the law has no term in params or none in tokens, so no best split of a budget between them")
    n, d = by_column["params"], by_column["tokens"]
    big_a, big_b = np.asarray(values[n.coefficient]), np.asarray(values[d.coefficient])
    alpha, beta = np.asarray(values[n.factors[0].exponent]), np.asarray(values[d.factors[0].exponent])
    total = alpha + beta
    return Allocation(np.exp(np.log(alpha * big_a / (beta * big_b)) / total), beta / total, alpha / total)
