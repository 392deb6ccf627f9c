"""What a term of a law is a power of: a column of the table, or what repetition or few bits leave of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """A parameter of a law."""

    name: str
    log: bool = False
    """Whether its logarithm is fitted, so that it is positive"""
    low: float = -math.inf
    high: float = math.inf
    """Bounds of what is fitted (of the logarithm, if `log`)"""
    starts: tuple[float, ...] = ()
    """Values of what is fitted from which a search begins"""


@runtime_checkable
class Quantity(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads; the first one is what it is about."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Its logarithm, and the derivatives by its parameters, each [B, n] or what broadcasts to it, of parameters
        [B, 1] each."""
        ...


@dataclass(frozen=True)
class Column:
    """A column as it is."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return ()

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        return np.log(columns[self.name])[None], []


PARAMETERS = Column("params")
TOKENS = Column("tokens")


@dataclass(frozen=True)
class Exponential(Column):
    """exp of a column: a factor of it to the power of -k is exp(-k column)."""

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        return columns[self.name][None], []


GAMMAS = {"bits": 2.67, "bits_activations": 2.21, "bits_cache": 0.96}
"""Of weights, activations, key-value cache: about what Kumar et al. 2024 found. Searches begin around them"""


@dataclass(frozen=True)
class Effective:
    """What is left of parameters at few bits: N times the product over kinds of 1 - exp(-bits / gamma) (Kumar et al.
    2024, arXiv:2411.04330). The kinds are columns with the number of bits: of weights, activations, the key-value
    cache; each has a gamma of its own."""

    of: Quantity = PARAMETERS
    kinds: tuple[str, ...] = ("bits",)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.of.columns, *self.kinds)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        around = [(kind, GAMMAS.get(kind, 2.0)) for kind in self.kinds]
        return (
            *self.of.parameters,
            *(
                Parameter(
                    f"gamma_{kind}", log=True, low=math.log(0.05), high=math.log(50),
                    starts=tuple(math.log(gamma * by) for by in (0.3, 0.6, 1.0, 1.7, 3.0)),
                )
                for kind, gamma in around
            ),
        )  # fmt: skip

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        of = len(self.of.parameters)
        total, slopes = self.of.log(theta[:of], columns)
        for kind, log_gamma in zip(self.kinds, theta[of:], strict=True):
            x = columns[kind] * np.exp(-log_gamma)
            total = total + np.log(-np.expm1(-x))
            slopes = [*slopes, -x / np.expm1(x)]
        return total, slopes


@dataclass(frozen=True)
class Repeated:
    """What is left of repeated data: D' = U + U R (1 - exp(-(D / U - 1) / R)), with U unique tokens among D and R
    epochs after which repeating is worth little (Muennighoff et al. 2023, arXiv:2305.16264; their R, 15.4, is weakly
    determined: look at its profile)."""

    of: Quantity = TOKENS
    unique: str = "unique_tokens"
    name: str = "R"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.of.columns, self.unique)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        worth = Parameter(
            self.name, log=True, low=math.log(0.05), high=math.log(1e4),
            starts=tuple(map(math.log, (0.5, 2.0, 6.0, 20.0, 80.0, 500.0))),
        )  # fmt: skip
        return (*self.of.parameters, worth)

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        *inner, log_r = theta
        total, slopes = self.of.log(inner, columns)
        r = np.exp(log_r)
        log_unique = np.minimum(np.log(columns[self.unique])[None], total)
        repeats = np.expm1(total - log_unique)
        x = repeats / r
        decayed = -np.expm1(-x)
        worth = 1 + r * decayed
        # d worth / d ln r = r (1 - e^-x) - repeats e^-x, and the inner quantity enters through `repeats`.
        by_r = (r * decayed - repeats * np.exp(-x)) / worth
        inside = np.where(repeats > 0, np.exp(-x) * (1 + repeats) / worth, 1.0)
        return log_unique + np.log(worth), [*(inside * slope for slope in slopes), by_r]


@dataclass(frozen=True)
class Excess:
    """What is left of parameters beyond those that the unique tokens can teach: N' = U + U R (1 - exp(-(N / U - 1) /
    R)) with U = min(N, scale unique^exponent), the best N for the unique tokens seen once (Muennighoff et al. 2023).

    Attributes:
        scale, exponent: of the best N for D tokens, from a law of data that does not repeat (`best_for`).
    """

    scale: float
    exponent: float
    unique: str = "unique_tokens"
    name: str = "R_N"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("params", self.unique)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return Repeated(name=self.name).parameters

    def log(
        self, theta: Sequence[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        seen = np.minimum(columns[self.unique], columns["tokens"]) if "tokens" in columns else columns[self.unique]
        enough = {"params": columns["params"], "enough": self.scale * seen**self.exponent}
        return Repeated(of=PARAMETERS, unique="enough", name=self.name).log(theta, enough)


def best_for(a: float, scale: float) -> tuple[float, float]:
    """Of N* = scale X^a and D* = X^(1 - a) / scale (`law.Allocation`): N* = s D*^k, as (s, k), for `Excess`."""
    k = a / (1 - a)
    return scale ** (1 + k), k
