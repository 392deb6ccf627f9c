"""Quantized weights in the layout of another format: codes and steps of each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slmjax.compress.quant.grids import Grid
from slmjax.compress.quant.view import Packed
from slmjax.convert import table
from slmjax.errors import UserError
from slmjax.models.families.common.rows import Row
from slmjax.tree import flatten, unflatten

Tensors = Iterator[tuple[str, np.ndarray]]
MARK = -(2.0**20)
"""Marks the quantized entries of a tensor while it is moved; far from what `then` may add to others (a norm's 1)"""


class PackedTensor(NamedTuple):
    """A tensor [out, in] of another format whose values are `steps * (codes - zeros + grid.offset)`."""

    codes: np.ndarray  # int16 [out, in]
    steps: np.ndarray  # float32 [out, groups]
    zeros: np.ndarray | None  # int16 [out, groups]; None for a symmetric grid
    grid: Grid

    @property
    def group(self) -> int:
        """Consecutive input channels that share a step"""
        return self.codes.shape[1] // self.steps.shape[1]

    def values(self) -> np.ndarray:
        """float32 [out, in], bit for bit what the model computes with."""
        zeros = 0.0 if self.zeros is None else np.repeat(self.zeros, self.group, axis=1)
        shifted = self.codes.astype(np.float32) - zeros + np.float32(self.grid.offset)
        return np.repeat(self.steps, self.group, axis=1) * shifted + np.float32(0)


class Kind(NamedTuple):
    """What quantized parameters have in common that share a tensor."""

    grid: Grid
    zeros: bool
    """Whether there are zero points"""
    group: int | None
    """Input channels that share a step; None: all of an output channel, or of the matrix"""


def kind_of(packed: Packed) -> Kind:
    """The kind of one quantized parameter."""
    return Kind(packed.grid, packed.codes.zeros is not None, packed.blocks.group)


def to_theirs(
    rows: Sequence[Row],
    params: Any,
    packed: Mapping[str, Packed],
    then: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Iterator[tuple[str, np.ndarray | PackedTensor]]:
    """Our parameters -> (their key, tensor), one at a time: packed where all that it holds is quantized.

    Args:
        params: float32; of quantized parameters, the values of their codes.
        packed: {path of our parameter: its codes} (`ParamView.pack`).
        then: a further change of layout, such as `GGUFArchitecture.tensors`. It is applied to codes and steps as well,
            so of quantized tensors it may only move entries.

    Raises:
        UserError: a tensor holds quantized parameters beside others or of several kinds, or its last axis is not that
            of the input channels.
    """
    flat = flatten(params)
    kinds = list(dict.fromkeys(kind_of(p) for p in packed.values()))

    def moved(pick: Callable[[Packed], np.ndarray]) -> Tensors:
        """For each tensor, what `pick` gives for the quantized parameters in it; 0 for others."""
        zero = np.float32(0)
        picked = {
            path: pick(packed[path]) if path in packed else np.broadcast_to(zero, x.shape) for path, x in flat.items()
        }
        return then(table.to_theirs(rows, unflatten(picked)))

    streams = (
        then(table.to_theirs(rows, params)),
        moved(lambda p: np.asarray(p.codes.codes, np.float32)),
        moved(lambda p: spread(p, p.codes.steps)),
        moved(lambda p: spread(p, p.codes.zeros)),
        moved(lambda p: np.broadcast_to(np.float32(MARK - kinds.index(kind_of(p))), p.blocks.shape)),
    )
    for (key, plain), (_, codes), (_, steps), (_, zeros), (_, numbers) in zip(*streams, strict=True):
        first, last = float(numbers.min()), float(numbers.max())
        if first > MARK:
            yield key, plain
            continue
        if first != last:
            raise UserError(f"{key} holds parameters that are quantized differently; let one rule cover them all")
        kind = kinds[int(MARK - first)]
        size = codes.shape[-1] if kind.group is None else kind.group
        some = reduced(key, zeros, size).astype(np.int16) if kind.zeros else None
        yield key, PackedTensor(codes.astype(np.int16), reduced(key, steps, size), some, kind.grid)


def spread(packed: Packed, scales: Any) -> np.ndarray:
    """Steps or zero points (None: zeros), one for each weight, in the weight's shape."""
    blocks = packed.blocks
    if scales is None:
        return np.broadcast_to(np.float32(0), blocks.shape)
    whole = np.broadcast_to(np.asarray(scales, np.float32).reshape(blocks.broadcast), blocks.blocked)
    return np.ascontiguousarray(whole).reshape(blocks.shape)


def reduced(key: str, x: np.ndarray, size: int) -> np.ndarray:
    """[out, in] -> [out, in / size], for an x that is the same for each `size` consecutive input channels.

    Raises:
        UserError: it is not: the format stores the weight with its input channels elsewhere.
    """
    if x.ndim != 2 or x.shape[1] % size:
        raise UserError(f"{key} of shape {list(x.shape)} cannot be cut into groups of {size} input channels")
    grouped = x.reshape(len(x), -1, size)
    if not (grouped == grouped[..., :1]).all():
        raise UserError(f"{key}: this format stores the weight transposed, so its scales have no place in it")
    return np.ascontiguousarray(grouped[..., 0])
