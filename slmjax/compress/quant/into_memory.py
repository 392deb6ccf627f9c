"""Quantized weights put into memory (`in_memory.InMemory`), one by one or in a whole tree of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from slmjax import tree
from slmjax.compress.quant.blocks import Axes, Blocks, sides
from slmjax.compress.quant.float4 import scale_of_matrix
from slmjax.compress.quant.grids import Grid
from slmjax.compress.quant.in_memory import InMemory, Layout, layout_of
from slmjax.compress.quant.view import Packed
from slmjax.nn.encoded import Encoded, is_encoded
from slmjax.types import Params

SHARE = 16
"""All packed weights take this many times the floats that exist at once"""


def in_memory(
    blocks: Blocks,
    axes: Axes,
    grid: Grid,
    steps: np.ndarray,
    zeros: np.ndarray | None,
    codes: Callable[[int, int], np.ndarray],
) -> InMemory:
    """A quantized parameter from its codes, of which only a few are read at a time.

    Args:
        steps, zeros: of shape `blocks.scales`.
        codes: (first, count) -> so many consecutive codes of the parameter, as indices of `grid.codes`, uint8 [count].
    """
    lay = layout_of(blocks, axes, grid)
    stacked = blocks.shape[: len(sides(axes, "").stacked)]
    matrices = math.prod(stacked)
    parts = tuple(np.zeros((matrices, *lay.shape(bits)), np.uint8) for bits in lay.parts)
    rows, columns = (lay.inputs, lay.outputs) if lay.inputs_first else (lay.outputs, lay.inputs)
    for matrix in range(matrices):
        for start, stop in _stretches(rows, columns, None if lay.inputs_first else lay.plane):
            found = codes((matrix * rows + start) * columns, (stop - start) * columns).reshape(-1, columns)
            _put(lay, [part[matrix] for part in parts], start, found)

    def scales(x: np.ndarray) -> np.ndarray:
        shared = math.prod(x.shape) == matrices
        groups = 1 if shared else x.size // matrices // lay.outputs
        shape = (groups, 1 if shared else lay.outputs)
        x = x.reshape(*stacked, *(shape if lay.inputs_first else shape[::-1]))
        pad = [(0, 0)] * x.ndim
        pad[x.ndim + lay.axis] = (0, 0 if shared else lay.plane * lay.planes - lay.outputs)
        return np.pad(x, pad, mode="edge")

    steps = np.asarray(steps, np.float32).reshape(blocks.scales)
    short, unit = shortest(steps, len(stacked))
    return InMemory(
        parts=tuple(part.reshape(*stacked, *part.shape[1:]) for part in parts),
        steps=scales(short),
        zeros=None if zeros is None else scales(np.asarray(zeros).astype(np.uint8)),
        unit=None if unit is None else unit.reshape(*stacked, 1, 1),
        grid=grid,
        blocks=blocks,
        axes=axes,
        signed=bool((steps <= 0).any()),
    )


def of_packed(packed: Packed) -> InMemory:
    """A parameter whose codes are known."""
    flat = np.asarray(packed.codes.codes).reshape(-1)

    def codes(first: int, count: int) -> np.ndarray:
        return np.searchsorted(packed.grid.codes, flat[first : first + count]).astype(np.uint8)

    steps, zeros = packed.codes.steps, packed.codes.zeros
    zeros = None if zeros is None else np.asarray(zeros)
    return in_memory(packed.blocks, packed.axes, packed.grid, np.asarray(steps), zeros, codes)


def with_codes(params: Params, packed: Mapping[str, Packed]) -> Params:
    """The parameters, those quantized as codes in memory."""

    def one(path: str, x: Any) -> Any:
        return jax.tree.map(jnp.asarray, of_packed(packed[path])) if path in packed else x

    return tree.map_with_path(one, params)


def held(params: Params) -> Params:
    """The tree with what each quantized parameter may decode at once: a share of the bytes of all parameters."""
    most = max(2**16, tree.nbytes(params) // SHARE)
    return jax.tree.map(
        lambda x: replace(x, at_once=most) if isinstance(x, InMemory) else x, params, is_leaf=is_encoded
    )


def packed_in(params: Params) -> Mapping[str, Packed]:
    """{path: codes} of the quantized parameters in the tree."""
    flat = tree.flatten(params, is_leaf=is_encoded)
    return {path: x.packed() for path, x in flat.items() if isinstance(x, InMemory)}


def floats(params: Params) -> Params:
    """The tree with every parameter as an array."""
    decode = jax.jit(lambda x: x.values())
    return jax.tree.map(lambda x: decode(x) if isinstance(x, Encoded) else x, params, is_leaf=is_encoded)


def shortest(steps: np.ndarray, stacked: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Steps in the shortest type that holds them exactly: powers of two as E8M0, those of NVFP4 as E4M3 in units of a
    power of two for each matrix (float32, the second result), others as `narrow`.

    Args:
        stacked: leading dimensions that stack matrices.
    """
    mantissa, exponent = np.frexp(steps)
    if (mantissa == 0.5).all() and exponent.min() > -126:
        return steps.astype(ml_dtypes.float8_e8m0fnu), None
    matrices = steps.reshape(math.prod(steps.shape[:stacked]), -1)
    units = [scale_of_matrix(x / 2) for x in matrices]  # for it, steps are half of what is rounded to E4M3
    if all(unit is not None for unit in units):
        unit = np.array(units, np.float32)
        return (matrices / unit[:, None]).astype(ml_dtypes.float8_e4m3fn).reshape(steps.shape), unit
    return narrow(steps), None


def narrow(steps: np.ndarray) -> np.ndarray:
    """Steps in the shortest type of 16 or 32 bits that holds them exactly."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        if np.array_equal(steps.astype(dtype).astype(np.float32), steps):
            return steps.astype(dtype)
    return steps


def _stretches(rows: int, columns: int, plane: int | None) -> Iterator[tuple[int, int]]:
    """Consecutive rows (start, stop) of at most about a million weights; of a table, in one plane."""
    most = max(1, 2**20 // columns)
    for first in range(0, rows, plane or rows):
        last = min(rows, first + (plane or rows))
        for start in range(first, last, most):
            yield start, min(last, start + most)


def _put(lay: Layout, parts: list[np.ndarray], start: int, codes: np.ndarray) -> None:
    """Puts codes uint8 [n, columns] of rows from `start` on into the bytes of each part of one matrix."""
    shift = 0
    for bits, part in zip(lay.parts, parts, strict=True):
        mine = (codes >> np.uint8(shift)) & np.uint8(2**bits - 1)
        shift += bits
        if not lay.inputs_first:
            plane, place = lay.place(bits, start // lay.plane)
            place += start % lay.plane
            part[place : place + len(mine)] |= mine << np.uint8(plane * bits)
            continue
        size = part.shape[1]
        for plane in range(8 // bits):
            piece = mine[:, plane * size : (plane + 1) * size]
            part[start : start + len(mine), : piece.shape[1]] |= piece << np.uint8(plane * bits)
