"""Which entries of a weight share one scale: all of a matrix, an output channel, or a group of its input channels."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple

from slmjax.axes import APART, STACKED
from slmjax.errors import UserError
from slmjax.optim.matrices import matrix

Axes = tuple[str | None, ...]
Shape = tuple[int, ...]

BLOCK = "block"
"""Logical axis of the groups of input channels"""


class Sides(NamedTuple):
    """The dimensions of a weight: those that stack matrices, that a product sums over, and of its output."""

    stacked: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def sides(axes: Axes, path: str) -> Sides:
    """
    Raises:
        UserError: the parameter is not a matrix of products: a gain, a bias, the taps of a convolution.
    """
    found = matrix(axes, path)
    if found is None or "tap" in axes:
        raise UserError(f"{path} has the axes {', '.join(map(str, axes))}: not a matrix, so it cannot be quantized")
    stacked = tuple(i for i, name in enumerate(axes) if name in STACKED)
    table = any(name in APART for name in axes)  # a row for each token: the product with it sums over its columns
    return Sides(stacked, *((found.columns, found.rows) if table else (found.rows, found.columns)))


class Blocks(NamedTuple):
    """How a weight of one shape is cut. In the blocked shape its input dimensions are one (`in`, or `groups, in`)."""

    shape: Shape
    """Of the weight"""
    blocked: Shape
    over: tuple[int, ...]
    """Dimensions of the blocked shape that share a scale"""
    group: int | None = None
    """Input channels that share a scale; None: all of an output channel, or of the matrix"""
    stacked: tuple[int, ...] = ()
    """Dimensions of the blocked shape that stack matrices"""

    @property
    def scales(self) -> Shape:
        """The shape of the scales, without the dimensions that share one."""
        return tuple(n for i, n in enumerate(self.blocked) if i not in self.over)

    @property
    def broadcast(self) -> Shape:
        """The shape of the scales that broadcasts against the blocked shape."""
        return tuple(1 if i in self.over else n for i, n in enumerate(self.blocked))

    @property
    def size(self) -> int:
        """Weights that share a scale"""
        return math.prod(self.blocked[i] for i in self.over)


@dataclass(frozen=True, kw_only=True)
class Granularity(abc.ABC):
    """Which entries of a matrix share a scale."""

    @abc.abstractmethod
    def cut(self, shape: Shape, axes: Axes, path: str) -> Blocks:
        """
        Raises:
            UserError: the parameter is not a matrix, or the groups do not divide its inputs.
        """

    @abc.abstractmethod
    def axes(self, axes: Axes, path: str) -> Axes:
        """Logical axes of the scales."""


@dataclass(frozen=True, kw_only=True)
class PerTensor(Granularity):
    """One scale for each matrix."""

    def cut(self, shape: Shape, axes: Axes, path: str) -> Blocks:
        stacked = sides(axes, path).stacked
        return Blocks(shape, shape, tuple(i for i in range(len(shape)) if i not in stacked), stacked=stacked)

    def axes(self, axes: Axes, path: str) -> Axes:
        return tuple(axes[i] for i in sides(axes, path).stacked)


@dataclass(frozen=True, kw_only=True)
class PerChannel(Granularity):
    """One scale for each output channel."""

    def cut(self, shape: Shape, axes: Axes, path: str) -> Blocks:
        cut = sides(axes, path)
        return Blocks(shape, shape, cut.inputs, stacked=cut.stacked)

    def axes(self, axes: Axes, path: str) -> Axes:
        inputs = sides(axes, path).inputs
        return tuple(name for i, name in enumerate(axes) if i not in inputs)


@dataclass(frozen=True, kw_only=True)
class PerGroup(Granularity):
    """One scale for each `size` consecutive input channels of an output channel."""

    size: int = 128

    def __post_init__(self):
        if self.size < 1:
            raise UserError(
                f"granularity.size is {self.size}; expected a positive number of input channels, such as 128"
            )

    def cut(self, shape: Shape, axes: Axes, path: str) -> Blocks:
        stacked, inputs, _ = sides(axes, path)
        first, last = inputs[0], inputs[-1] + 1
        width = math.prod(shape[first:last])
        if width % self.size:
            raise UserError(
                f"granularity.size is {self.size}, which does not divide the {width} input channels of {path}; "
                f"choose a divisor, such as {math.gcd(width, self.size)}, or PerChannel()"
            )
        blocked = (*shape[:first], width // self.size, self.size, *shape[last:])
        moved = tuple(i if i < first else i + len(blocked) - len(shape) for i in stacked)
        return Blocks(shape, blocked, (first + 1,), self.size, moved)

    def axes(self, axes: Axes, path: str) -> Axes:
        inputs = sides(axes, path).inputs
        return (*axes[: inputs[0]], BLOCK, *axes[inputs[-1] + 1 :])
