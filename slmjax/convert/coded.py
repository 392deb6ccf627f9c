"""Quantized tensors of other formats put into the parameters of slmjax as codes, without becoming floats."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from slmjax.axes import STACKED
from slmjax.compress.quant.blocks import Axes, PerChannel, PerGroup, PerTensor
from slmjax.compress.quant.grids import Grid
from slmjax.compress.quant.in_memory import InMemory
from slmjax.compress.quant.into_memory import in_memory
from slmjax.convert import table
from slmjax.convert.table import Entry, Where
from slmjax.errors import UserError
from slmjax.models.families.common.rows import Row
from slmjax.tree import flatten, is_axes, unflatten
from slmjax.types import Params

ROWS = 2**20
"""Weights whose values are compared at a time"""


class Coded(NamedTuple):
    """A tensor [out, in] of another format whose values are `steps * (grid.codes[codes] - zeros + grid.offset)`."""

    codes: np.ndarray  # uint8 [out, in]
    steps: np.ndarray  # float32 [out, groups]; 0 or negative, too
    zeros: np.ndarray | None  # uint8 [out, groups]; None for a symmetric grid
    grid: Grid

    @property
    def group(self) -> int:
        """Consecutive input channels that share a step"""
        return self.codes.shape[1] // self.steps.shape[1]

    @property
    def kind(self) -> tuple[Grid, bool, int]:
        """What the tensors of one parameter have to have in common."""
        return self.grid, self.zeros is not None, self.group

    def exactly(self, values: np.ndarray) -> Coded | None:
        """This tensor, if it has these values [out, in] bit for bit; else None."""
        rows = max(1, ROWS // self.codes.shape[1])
        for first in range(0, len(self.codes), rows):
            some = slice(first, first + rows)
            zeros = None if self.zeros is None else self.zeros[some]
            mine = decoded(self.codes[some], self.steps[some], zeros, self.grid)
            if not np.array_equal(mine.view(np.uint32), np.ascontiguousarray(values[some], np.float32).view(np.uint32)):
                return None
        return self


def decoded(codes: np.ndarray, steps: np.ndarray, zeros: np.ndarray | None, grid: Grid) -> np.ndarray:
    """The values of rows of a tensor, float32 [rows, in], as `InMemory` computes them."""
    levels = np.array(grid.codes, np.float32)[codes].reshape(*steps.shape, -1) + np.float32(grid.offset)
    if zeros is not None:
        levels -= zeros[..., None].astype(np.float32)
    return (steps[..., None] * levels + np.float32(0)).reshape(codes.shape)


class Source(Mapping[str, np.ndarray]):
    """The tensors of a file, as floats, of which some are quantized."""

    @abc.abstractmethod
    def coded(self, key: str) -> Coded | None:
        """A quantized tensor as the file holds it; None if it is not quantized, or has no such codes."""

    @abc.abstractmethod
    def as_theirs(self, key: str, x: np.ndarray) -> np.ndarray:
        """What `coded` gives (its codes, or one step for each of them) in the layout of the floats."""


class Part(NamedTuple):
    """The codes of a part of a parameter of ours, in its layout, with one step for each group of input channels."""

    codes: np.ndarray
    steps: np.ndarray
    zeros: np.ndarray | None


def to_ours(
    rows: Sequence[Row],
    source: Source,
    abstract: Any,
    axes: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Params:
    """As `table.to_ours`; but parameters all of whose tensors are quantized alike are `InMemory`, with the same values
    bit for bit. Others are arrays.

    Args:
        axes: logical axes of the parameters (`Model.axes`).
    """
    leaves, named = flatten(abstract), flatten(axes, is_leaf=is_axes)
    placed = table.placed(rows, source, abstract, shapes)
    left = Counter(path for entry, _ in placed for path, _ in entry.parts)
    plain: dict[str, np.ndarray] = {}
    packed: dict[str, Any] = {}  # being gathered, or complete
    for entry, key in placed:
        coded = source.coded(key)
        parts = None if coded is None else _parts(entry, key, coded, source, named)
        open_ = coded is not None and all(
            path not in plain and (path not in packed or packed[path].kind == coded.kind) for path, _ in entry.parts
        )
        if coded is not None and parts is not None and open_:
            for (path, where), part in zip(entry.parts, parts, strict=True):
                if path not in packed:
                    packed[path] = Gathered(path, leaves[path].shape, named[path], coded)
                packed[path].put(where, part)
        else:
            for (path, where), part in zip(entry.parts, entry.to_ours(table.floats(entry, source[key])), strict=True):
                if path not in plain:
                    found = packed.pop(path, None)
                    plain[path] = np.empty(leaves[path].shape, np.float32) if found is None else found.floats()
                plain[path][where] = part
        for path, _ in entry.parts:
            left[path] -= 1
            if not left[path] and path in packed:
                packed[path] = packed[path].complete()
    return unflatten({path: packed[path] if path in packed else plain[path] for path in leaves})


def _parts(entry: Entry, key: str, coded: Coded, source: Source, axes: Mapping[str, Axes]) -> list[Part] | None:
    """The parts of our parameters in a tensor; None if their input channels do not lie in its groups."""

    def moved(x: np.ndarray) -> Sequence[np.ndarray]:
        return entry.to_ours(source.as_theirs(key, x))

    def reduced(scales: np.ndarray, of: Sequence[Callable[[np.ndarray], np.ndarray | None]]) -> list[Any]:
        spread = moved(np.repeat(scales, coded.group, axis=1))
        return [reduce(x) for reduce, x in zip(of, spread, strict=True)]

    codes = moved(coded.codes)
    try:
        reduce = [
            _reduction(x.shape, _inner(axes[path], where), path, coded.group)
            for x, (path, where) in zip(codes, entry.parts, strict=True)
        ]
    except UserError:  # no matrix of products, or groups that do not divide its inputs
        return None
    steps = reduced(coded.steps, reduce)
    zeros = [None] * len(codes) if coded.zeros is None else reduced(coded.zeros, reduce)
    if any(x is None for x in steps) or (coded.zeros is not None and any(x is None for x in zeros)):
        return None
    return [Part(*found) for found in zip(codes, steps, zeros, strict=True)]


def _inner(axes: Axes, where: Where) -> Axes:
    """
    Raises:
        UserError: the part is not one layer of a stack, or all of a parameter.
    """
    if where and (len(where) > 1 or axes[0] not in STACKED):
        raise UserError("a part of a layer")
    return axes[len(where) :]


def _reduction(shape: tuple[int, ...], axes: Axes, path: str, size: int) -> Callable[[np.ndarray], np.ndarray | None]:
    """Numbers, one for each weight -> one for each group of input channels; None if they differ within one."""
    blocks = PerGroup(size=size).cut(shape, axes, path)

    def reduce(x: np.ndarray) -> np.ndarray | None:
        blocked = x.reshape(blocks.blocked)
        first = np.take(blocked, 0, axis=blocks.over[0])
        return first if (blocked == np.expand_dims(first, blocks.over[0])).all() else None

    return reduce


class Gathered:
    """A quantized parameter whose tensors come one after another."""

    def __init__(self, path: str, shape: tuple[int, ...], axes: Axes, first: Coded):
        self._path, self._axes, self._grid, self.kind = path, axes, first.grid, first.kind
        self._blocks = PerGroup(size=first.group).cut(shape, axes, path)
        self._codes = np.zeros(shape, np.uint8)
        self._steps = np.zeros(self._blocks.scales, np.float32)
        self._zeros = None if first.zeros is None else np.zeros(self._blocks.scales, np.uint8)

    def put(self, where: Where, part: Part) -> None:
        """Fills in a part."""
        self._codes[where], self._steps[where] = part.codes, part.steps
        if self._zeros is not None:
            self._zeros[where] = part.zeros

    def floats(self) -> np.ndarray:
        """What there is so far as values, float32."""
        return np.array(self._in_memory().packed().values())

    def complete(self) -> InMemory:
        """The parameter, with as few steps as hold it, and positive ones where all can be."""
        if self._zeros is not None and (self._zeros == (zero := int(self._zeros.flat[0]))).all():
            self._grid = replace(self._grid, low=self._grid.low - zero, high=self._grid.high - zero)
            self._zeros = None
        if self._zeros is None and self._steps.max() <= 0 and self._steps.min() < 0:
            low = int(-self._grid.high - 2 * self._grid.offset)
            self._codes = np.uint8(self._grid.levels - 1) - self._codes
            self._steps = np.where(self._steps == 0, np.float32(0), -self._steps)
            self._grid = replace(self._grid, low=low, high=low + self._grid.high - self._grid.low)
        at = self._blocks.over[0] - 1
        while (n := self._steps.shape[at]) > 1:
            by = 2 if n % 2 == 0 and self._equal(at, 2) else n
            if not self._equal(at, by):
                break
            self._steps = np.take(self._steps, range(0, n, by), axis=at)
            self._zeros = None if self._zeros is None else np.take(self._zeros, range(0, n, by), axis=at)
        return self._in_memory()

    def _equal(self, axis: int, by: int) -> bool:
        """Whether each `by` consecutive groups have the same step and zero point."""
        return _same(self._steps, axis, by) and (self._zeros is None or _same(self._zeros, axis, by))

    def _in_memory(self) -> InMemory:
        steps, zeros, at = self._steps, self._zeros, self._blocks.over[0] - 1
        inputs = self._blocks.blocked[at] * self._blocks.blocked[at + 1]
        granularity = PerGroup(size=inputs // steps.shape[at])
        if steps.shape[at] == 1:
            apart = tuple(i for i in range(steps.ndim) if i not in self._blocks.stacked)
            first = (*(slice(None) if i not in apart else slice(1) for i in range(steps.ndim)),)
            shared = (steps == steps[first]).all() and (zeros is None or (zeros == zeros[first]).all())
            granularity = PerTensor() if shared else PerChannel()
            if shared:
                steps, zeros = steps[first], None if zeros is None else zeros[first]
        blocks = granularity.cut(self._codes.shape, self._axes, self._path)
        flat = self._codes.reshape(-1)
        zeros = None if zeros is None else zeros.reshape(blocks.scales)
        return in_memory(
            blocks, self._axes, self._grid, steps.reshape(blocks.scales), zeros, lambda i, n: flat[i : i + n]
        )


def _same(x: np.ndarray, axis: int, by: int) -> bool:
    """Whether each `by` consecutive entries along an axis are equal."""
    split = x.reshape(*x.shape[:axis], -1, by, *x.shape[axis + 1 :])
    first = np.take(split, [0], axis=axis + 1)
    return bool((split == first).all())
