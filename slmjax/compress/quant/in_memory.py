"""Quantized weights in memory while a model runs: their codes side by side, decoded where a layer uses them.

The outputs of a matrix are split into as many planes of consecutive outputs as codes fit in a byte, and a byte holds a
code of each plane. So a plane is decoded by one shift and one mask of whole rows of bytes, which compilers turn into
vector instructions, and its outputs are those of a product by itself. Codes of 3, 5, 6 and 7 bits are split into parts
of 1, 2 and 4 bits that lie apart. What a few tokens need of the floats fits the cache of a processor core.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import tree
from slmjax.compress.quant.blocks import Axes, Blocks, sides
from slmjax.compress.quant.grids import Codes, Grid
from slmjax.compress.quant.view import Packed
from slmjax.nn.einsum_cpu import matrix_form
from slmjax.nn.encoded import Encoded

PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code -> bits of its parts, lowest first"""
FEW = 16
"""Up to so many tokens a product takes pieces of at most `CACHED` bytes"""
CACHED = 2**20
"""Bytes of floats that stay in the cache of a processor core"""


def width(levels: int) -> int:
    """Bits a code."""
    return max(1, math.ceil(math.log2(levels)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the codes of one matrix lie. In memory it is [inputs, outputs], or [outputs, inputs] for a table."""

    inputs: int
    outputs: int
    bits: int
    inputs_first: bool

    @property
    def parts(self) -> tuple[int, ...]:
        """Bits of each part of a code"""
        return PARTS[self.bits]

    @property
    def planes(self) -> int:
        """Codes of the smallest part in a byte"""
        return 8 // min(self.parts)

    @property
    def plane(self) -> int:
        """Outputs in a plane of the smallest part"""
        return math.ceil(self.outputs / self.planes)

    @property
    def axis(self) -> int:
        """The dimension of the outputs, from the end"""
        return -1 if self.inputs_first else -2

    def place(self, bits: int, plane: Any) -> tuple[Any, Any]:
        """Where a plane of the smallest part lies in the part of so many bits: (the plane, the output in it)."""
        coarser = bits // min(self.parts)
        return plane // coarser, plane % coarser * self.plane

    def shape(self, bits: int) -> tuple[int, int]:
        """Of the bytes of one part."""
        outputs = self.plane * self.planes * bits // 8
        return (self.inputs, outputs) if self.inputs_first else (outputs, self.inputs)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts", "steps", "zeros", "unit"),
    meta_fields=("grid", "blocks", "axes", "dtype", "at_once", "signed"),
)
@dataclass(frozen=True, kw_only=True)
class InMemory(Encoded):
    """A quantized parameter. Its leading dimensions, those that stack matrices, may have been cut by a scan."""

    parts: tuple[Any, ...]  # uint8 [..., inputs, outputs / codes a byte] (tables: the last two swapped), one a part
    steps: Any  # floats of 8, 16 or 32 bits [..., groups, outputs] (tables: swapped); 1 where all share one
    zeros: Any  # uint8, shaped like the steps; None for a symmetric grid
    unit: Any = None  # float32 [..., 1, 1]: the steps are in units of it, a power of two for each matrix; None: of 1
    grid: Grid
    blocks: Blocks
    """Of the parameter before any cut"""
    axes: Axes
    dtype: str = "float32"
    """Of the floats"""
    at_once: int = 2**22
    """Bytes of floats that may exist at once"""
    signed: bool = False
    """Whether some steps are 0 or negative, with which a code may stand for -0: it is made +0"""

    @property
    def _stacked(self) -> int:
        return len(sides(self.axes, "").stacked)

    @property
    def layout(self) -> Layout:
        return layout_of(self.blocks, self.axes, self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts[0].shape[:-2], *self.blocks.shape[self._stacked :])

    @property
    def nbytes(self) -> int:
        return tree.nbytes(self)

    def astype(self, dtype: Any) -> InMemory:
        return replace(self, dtype=jnp.dtype(dtype).name)

    def values(self) -> jax.Array:
        lay = self.layout
        codes = [self._codes(plane, 0, lay.plane) for plane in range(lay.planes)]
        whole = codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=lay.axis)
        return _cut(self._decoded(whole, 0), lay.axis, 0, lay.outputs).reshape(self.shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        lay = self.layout
        if lay.inputs_first or self.ndim != 2:
            return jnp.take(self.values(), ids, axis=0)

        def part(bits: int, x: jax.Array) -> jax.Array:
            plane, place = lay.place(bits, ids // lay.plane)
            return (x[place + ids % lay.plane] >> (plane * bits).astype(jnp.uint8)[..., None]) & jnp.uint8(2**bits - 1)

        def scale(x: Any) -> Any:
            return x if x is None or x.shape[0] == 1 else x[ids]

        return self._values(_joined(lay, self.parts, part), scale(self.steps), scale(self.zeros), -1)

    def contracted(self, equation: str, x: jax.Array, einsum: Callable) -> jax.Array:
        lay, form = self.layout, matrix_form(equation)
        inputs = self.blocks.shape[self._stacked :]
        dims = len(sides(self.axes, "").inputs)
        x, held = self._now(x)
        if form != (dims, lay.inputs_first) or self.ndim != len(inputs):
            return einsum(equation, x, held.values())
        flat = x.reshape(-1, lay.inputs)
        most = min(self.at_once, CACHED) if len(flat) <= FEW else self.at_once
        size = max(1, most // (lay.inputs * jnp.dtype(self.dtype).itemsize))
        if size >= lay.planes * lay.plane:
            return einsum(equation, x, held.values())
        y = held._pieces(flat, einsum, min(size, lay.plane))
        outputs = inputs[dims:] if lay.inputs_first else inputs[: len(inputs) - dims]
        return y.reshape(*x.shape[: x.ndim - dims], *outputs)

    def _now(self, x: jax.Array) -> tuple[jax.Array, InMemory]:
        """The same, so that nothing is decoded before x is known: else XLA decodes outside of a loop over tokens what
        is the same for all of them, and keeps it."""
        x, parts = jax.lax.optimization_barrier((x, self.parts))
        return x, replace(self, parts=parts)

    def _pieces(self, x: jax.Array, einsum: Callable, size: int) -> jax.Array:  # [N, inputs] -> [N, outputs]
        """The product, `size` outputs at a time (at most a plane)."""
        lay = self.layout
        formula = "nk,ko->no" if lay.inputs_first else "nk,ok->no"

        count = math.ceil(lay.plane / size)
        size = math.ceil(lay.plane / count)

        # A loop, so that one piece exists at a time whatever the compiler's order of independent operations is. The
        # last piece of a plane may overlap the one before it.
        def body(i: jax.Array, y: jax.Array) -> jax.Array:
            plane, start = i // count, jnp.minimum(i % count * size, lay.plane - size)
            first = plane * lay.plane + start
            piece = self._decoded(self._codes(plane, start, size), first)
            return jax.lax.dynamic_update_slice(y, einsum(formula, x, piece), (0, first))

        empty = jnp.zeros((len(x), lay.planes * lay.plane), jnp.result_type(x, self.dtype))
        return jax.lax.fori_loop(0, count * lay.planes, body, empty)[:, : lay.outputs]

    def _codes(self, plane: Any, start: Any, size: int) -> jax.Array:
        """The codes, as indices of `grid.codes`, uint8, of `size` outputs of a plane of the smallest part."""
        lay = self.layout

        def part(bits: int, x: jax.Array) -> jax.Array:
            coarse, place = lay.place(bits, plane)
            piece = _cut(x, lay.axis, place + start, size)
            shift = jnp.asarray(coarse * bits, jnp.uint8)
            return piece if bits == 8 else (piece >> shift) & jnp.uint8(2**bits - 1)

        return _joined(lay, self.parts, part)

    def _decoded(self, codes: jax.Array, first: Any) -> jax.Array:
        """The values of codes of consecutive outputs."""
        lay = self.layout
        size = codes.shape[lay.axis]

        def scale(x: Any) -> Any:
            return x if x is None or x.shape[lay.axis] == 1 else _cut(x, lay.axis, first, size)

        return self._values(codes, scale(self.steps), scale(self.zeros), -3 - lay.axis)

    def _values(self, codes: jax.Array, steps: Any, zeros: Any, axis: int) -> jax.Array:
        """As `grids.decode`: one product of exact numbers. `axis`: that of the inputs (their groups), from the end."""
        shape, at = codes.shape, codes.ndim + axis
        groups = steps.shape[axis]
        codes = codes.reshape(*shape[:at], groups, shape[at] // groups, *shape[at + 1 :])
        shifted = self.grid.numbered(codes) + self.grid.offset
        if zeros is not None:
            shifted = shifted - jnp.expand_dims(zeros.astype(jnp.float32), axis)
        steps = steps.astype(jnp.float32) if self.unit is None else steps.astype(jnp.float32) * self.unit
        values = jnp.expand_dims(steps, axis) * shifted
        if self.signed:
            values = jnp.where(values == 0, 0.0, values)
        return values.reshape(shape).astype(self.dtype)

    def packed(self) -> Packed:
        """The codes one by one, as numpy."""
        lay, blocks = self.layout, self.blocks
        codes = np.concatenate([_host(lay, self.parts, plane) for plane in range(lay.planes)], axis=lay.axis)
        codes = codes[..., : lay.outputs] if lay.inputs_first else codes[..., : lay.outputs, :]
        codes = np.take(np.array(self.grid.codes, np.int16), codes.reshape(blocks.shape), mode="clip")
        zeros = None if self.zeros is None else self._scales(self.zeros).astype(np.int16)
        steps = np.asarray(self.steps).astype(np.float32)
        steps = self._scales(steps if self.unit is None else steps * np.asarray(self.unit))
        return Packed(Codes(codes, steps, zeros), self.grid, blocks, self.axes)

    def _scales(self, x: Any) -> np.ndarray:
        lay, x = self.layout, np.asarray(x)
        if x.shape[lay.axis] > 1:
            x = x[..., : lay.outputs] if lay.inputs_first else x[..., : lay.outputs, :]
        return x.reshape(self.blocks.scales)


def layout_of(blocks: Blocks, axes: Axes, grid: Grid) -> Layout:
    """How the matrices of a parameter are laid out."""
    found = sides(axes, "")
    inputs, outputs = (math.prod(blocks.shape[i] for i in side) for side in (found.inputs, found.outputs))
    return Layout(
        inputs=inputs, outputs=outputs, bits=width(grid.levels), inputs_first=found.inputs[0] < found.outputs[0]
    )


def _joined(lay: Layout, parts: tuple[Any, ...], piece: Callable[[int, Any], Any]) -> Any:
    """Codes from what `piece` (bits, part) gives for each of their parts."""
    codes, shift = None, 0
    for bits, x in zip(lay.parts, parts, strict=True):
        found = piece(bits, x)
        codes = found if codes is None else codes | (found << np.uint8(shift))
        shift += bits
    return codes


def _cut(x: Any, axis: int, start: Any, size: int) -> Any:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _host(lay: Layout, parts: tuple[Any, ...], plane: int) -> np.ndarray:
    """`InMemory._codes` of a whole plane, in numpy."""

    def part(bits: int, x: Any) -> np.ndarray:
        (coarse, place), x = lay.place(bits, plane), np.asarray(x)
        here = slice(place, place + lay.plane)
        piece = x[..., here] if lay.inputs_first else x[..., here, :]
        return (piece >> np.uint8(coarse * bits)) & np.uint8(2**bits - 1)

    return _joined(lay, parts, part)
