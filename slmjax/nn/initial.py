"""Initial values of matrices and tables. Gains start at 1, biases at 0."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.nn import initializers

from slmjax.errors import UserError
from slmjax.traced import TRACED
from slmjax.types import Factors


class Role(NamedTuple):
    """Description of a matrix or table whose initial values are to be drawn, for one layer."""

    path: str
    """Its path in the tree of parameters: `layers/attn/q`, `layers/0/mlp/up`, `embed/table`"""
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """The name of each dimension (axes.py)"""
    fan_in: int | None
    """How many inputs are summed for each output; None for tables that are looked up, and taps of convolutions"""
    residual: bool
    """Whether its product is added to the residual stream"""
    branches: int
    """How many such products the residual stream sums: 2L in a decoder of L layers; 1 if each sum is followed by a
    norm, as in BERT"""

    def size(self, axis: str) -> int | None:
        """The size of the dimension of this name; None if there is none."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else None


class Initial(abc.ABC):
    """How initial values are drawn. A subclass is a frozen dataclass, all of whose numbers may be traced arrays."""

    @abc.abstractmethod
    def __call__(self, role: Role) -> tuple[Any, str]:
        """The initializer, (key, shape, dtype) -> array, of a matrix or table, and its distribution as text."""

    def check(self) -> None:  # noqa: B027  # most have nothing to check
        """Checks its numbers; called when a model with it is created.

        Raises:
            UserError: a number out of range.
        """

    @property
    def stated(self) -> float:
        """`initializer_range` in a config.json of transformers, which holds a single standard deviation."""
        return 0.02

    def fits(self, model: Any) -> None:  # noqa: B027
        """Checks a model (`models.assembly.Assembly`) that is to be trained from these values.

        Raises:
            UserError: its multipliers are not those that these values go with (`models.parametrisation`).
        """

    def factors(self, model: Any, step_norms: Callable[[Any], Mapping[str, Any]]) -> Mapping[str, Factors]:
        """How parameters of this model train beside the others, by path: none by default. Values that belong to a
        parametrisation, such as muP, come with learning rates (`models.parametrisation`).

        Args:
            step_norms: `OptimizerSpec.step_norms` of the optimizer.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Normal(Initial):
    """Normally distributed values with one standard deviation, except that of a decoder's matrices whose product is
    added to the residual stream: there it is divided by sqrt(2L), since the stream sums 2L such products. Radford et
    al. 2019 (GPT-2), section 2.3.
    """

    std: Any = field(default=0.02, metadata=TRACED)
    """Standard deviation of every matrix and table"""
    residual: Any = field(default=1.0, metadata=TRACED)
    """Additional factor on `std` for matrices whose product is added to the residual stream"""

    def __call__(self, role: Role) -> tuple[Any, str]:
        std = self.std * (self.residual / math.sqrt(role.branches) if role.residual else 1.0)
        return initializers.normal(std), f"normal({std:.4g})" if isinstance(std, int | float) else "normal"

    def check(self) -> None:
        for name in ("std", "residual"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not 0 <= value < math.inf:
                raise UserError(f"initial.{name}: {value} is not a number of at least 0")

    @property
    def stated(self) -> float:
        return self.std
