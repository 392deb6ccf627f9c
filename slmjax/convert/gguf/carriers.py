"""Which of llama.cpp's packed types holds a quantized tensor exactly, and the tensor packed into it.

Weights are never rounded again: the codes of training are written, and a type is chosen in which `step * (code - zero +
offset)` is a value bit for bit.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slmjax.compress.quant.float4 import Float4, scale_of_matrix
from slmjax.convert.gguf import layouts
from slmjax.convert.gguf.layouts import Format
from slmjax.convert.packed import PackedTensor
from slmjax.errors import UserError

FACTORS = (1.0, -1.0, 0.5, -0.5)
"""What d may be, in steps: negative to mirror a grid, half for values halfway between integers"""


@dataclass(frozen=True, kw_only=True)
class Carrier(abc.ABC):
    """A packed type of llama.cpp."""

    format: Format
    file_type: int
    """The value of general.file_type for a file that mostly has this type"""

    @abc.abstractmethod
    def holds(self, tensor: PackedTensor) -> bool:
        """Whether the grid's values are values of this type."""

    @abc.abstractmethod
    def scale(self, tensor: PackedTensor) -> np.ndarray:
        """d [out, groups], float32, for a tensor that it holds."""

    @abc.abstractmethod
    def blocks(self, tensor: PackedTensor, d: np.ndarray) -> np.ndarray:
        """uint8 [blocks, bytes of a block].

        Args:
            d: of each block.
        """

    def fits(self, tensor: PackedTensor) -> str | None:
        """None if the tensor fits exactly; else why it does not."""
        block = self.format.block
        if not self.holds(tensor):
            return "has other values"
        if tensor.codes.shape[1] % block:
            return f"needs rows of a multiple of {block}"
        if tensor.group % block:
            return f"needs a scale for each multiple of {block}"
        d = self.scale(tensor)
        with np.errstate(over="ignore"):
            exact = d.astype(np.float16).astype(np.float32) == d
        return None if exact.all() else "needs scales that are float16"

    def of_matrix(self, tensor: PackedTensor) -> np.ndarray | None:
        """The scale of the whole matrix, float32 [1], which a file holds as a tensor of its own; None if the type has
        none."""
        return None

    def pack(self, tensor: PackedTensor) -> np.ndarray:
        """The tensor's bytes, uint8 [out, bytes of a row]."""
        rows, width = tensor.codes.shape
        d = np.repeat(self.scale(tensor).reshape(-1), tensor.group // self.format.block)
        return self.blocks(tensor, d).reshape(rows, width // self.format.block * self.format.size)

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        """Bytes [out, bytes of a row] -> values, float32 [out, in]."""
        return self.format.unpack(raw.reshape(-1, self.format.size)).reshape(len(raw), -1)


@dataclass(frozen=True, kw_only=True)
class Scaled(Carrier):
    """Values `d * level`."""

    levels: tuple[int, ...]
    write: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(levels [blocks, weights of a block], d [blocks]) -> uint8 [blocks, bytes of a block]"""

    def factor(self, tensor: PackedTensor) -> float | None:
        """d in steps; None if the grid's values are not among d's multiples."""
        if tensor.zeros is not None:
            return None
        grid = np.arange(tensor.grid.low, tensor.grid.high + 1) + tensor.grid.offset
        return next((f for f in FACTORS if np.isin(grid / f, self.levels).all()), None)

    def holds(self, tensor: PackedTensor) -> bool:
        return self.factor(tensor) is not None

    def scale(self, tensor: PackedTensor) -> np.ndarray:
        return tensor.steps * np.float32(self.factor(tensor) or 0)

    def blocks(self, tensor: PackedTensor, d: np.ndarray) -> np.ndarray:
        levels = ((tensor.codes + tensor.grid.offset) / (self.factor(tensor) or 1)).astype(np.int16)
        return self.write(levels.reshape(-1, self.format.block), d)


@dataclass(frozen=True, kw_only=True)
class Affine(Carrier):
    """Values `d * (times * u - minus)` with u counted from 0, which also holds zero points."""

    most: int
    """Largest u"""
    most_minus: int
    write: Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
    """(u [blocks, weights of a block], d [blocks], times, minus [blocks]) -> uint8 [blocks, bytes of a block]"""

    def times(self, tensor: PackedTensor) -> int:
        """1, or 2 for values halfway between integers."""
        return 1 if float(tensor.grid.offset).is_integer() else 2

    def minus(self, tensor: PackedTensor) -> np.ndarray:
        """What is subtracted, in units of d: [out, groups]."""
        zeros = np.zeros(tensor.steps.shape) if tensor.zeros is None else tensor.zeros
        return self.times(tensor) * (zeros - tensor.grid.low - tensor.grid.offset)

    def holds(self, tensor: PackedTensor) -> bool:
        minus = self.minus(tensor)
        integers = (minus == np.round(minus)).all() and minus.min() >= 0 and minus.max() <= self.most_minus
        return bool(integers and tensor.grid.high - tensor.grid.low <= self.most)

    def scale(self, tensor: PackedTensor) -> np.ndarray:
        return tensor.steps / np.float32(self.times(tensor))

    def blocks(self, tensor: PackedTensor, d: np.ndarray) -> np.ndarray:
        minus = np.repeat(self.minus(tensor).astype(np.int64).reshape(-1), tensor.group // self.format.block)
        u = (tensor.codes - tensor.grid.low).reshape(-1, self.format.block)
        return self.write(u, d, self.times(tensor), minus)


@dataclass(frozen=True, kw_only=True)
class PowersOfTwo(Carrier):
    """Floating point numbers of 4 bits, a power of two for each block."""

    def holds(self, tensor: PackedTensor) -> bool:
        return isinstance(tensor.grid, Float4)

    def scale(self, tensor: PackedTensor) -> np.ndarray:
        return tensor.steps

    def fits(self, tensor: PackedTensor) -> str | None:
        mantissa, exponent = np.frexp(tensor.steps)
        exact = (mantissa == 0.5) & (exponent > -126) & (exponent < 127)
        return super().fits(tensor._replace(steps=np.ones_like(tensor.steps))) or (
            None if exact.all() else "needs scales that are powers of two"
        )

    def blocks(self, tensor: PackedTensor, d: np.ndarray) -> np.ndarray:
        return layouts.pack_mxfp4(tensor.codes.reshape(-1, self.format.block), d)


@dataclass(frozen=True, kw_only=True)
class TwoScales(Carrier):
    """Floating point numbers of 4 bits, an E4M3 scale for each 16 and one for the matrix."""

    every: int = 16

    def holds(self, tensor: PackedTensor) -> bool:
        return isinstance(tensor.grid, Float4)

    def of_matrix(self, tensor: PackedTensor) -> np.ndarray | None:
        found = scale_of_matrix(tensor.steps)
        return None if found is None else np.array([found], np.float32)

    def scale(self, tensor: PackedTensor) -> np.ndarray:
        return tensor.steps / (self.of_matrix(tensor) or 1)

    def fits(self, tensor: PackedTensor) -> str | None:
        if not self.holds(tensor):
            return "has other values"
        if tensor.codes.shape[1] % self.format.block:
            return f"needs rows of a multiple of {self.format.block}"
        if tensor.group % self.every:
            return f"needs a scale for each multiple of {self.every}"
        return None if self.of_matrix(tensor) is not None else "needs scales that are E4M3 times a power of two"

    def pack(self, tensor: PackedTensor) -> np.ndarray:
        d = np.repeat(self.scale(tensor).reshape(-1), tensor.group // self.every)
        return self.blocks(tensor, d).reshape(len(tensor.codes), -1)

    def blocks(self, tensor: PackedTensor, d: np.ndarray) -> np.ndarray:
        return layouts.pack_nvfp4(tensor.codes.reshape(-1, self.format.block), d)


def _span(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


Q1_0 = Scaled(format=layouts.Q1_0, file_type=40, levels=(-1, 1), write=layouts.pack_q1_0)
TQ1_0 = Scaled(format=layouts.TQ1_0, file_type=36, levels=_span(-1, 1), write=layouts.pack_tq1_0)
TQ2_0 = Scaled(format=layouts.TQ2_0, file_type=37, levels=_span(-1, 2), write=layouts.pack_tq2_0)
Q2_0 = Scaled(format=layouts.Q2_0, file_type=41, levels=_span(-1, 2), write=layouts.pack_q2_0)
Q2_K = Affine(format=layouts.Q2_K, file_type=10, most=3, most_minus=15, write=layouts.pack_q2_k)
Q3_K = Scaled(format=layouts.Q3_K, file_type=11, levels=_span(-4, 3), write=layouts.pack_q3_k)
MXFP4 = PowersOfTwo(format=layouts.MXFP4, file_type=38)
NVFP4 = TwoScales(format=layouts.NVFP4, file_type=39)
Q4_0 = Scaled(format=layouts.Q4_0, file_type=2, levels=_span(-8, 7), write=layouts.pack_q4_0)
Q4_K = Affine(format=layouts.Q4_K, file_type=14, most=15, most_minus=63, write=layouts.pack_q4_k)
Q5_0 = Scaled(format=layouts.Q5_0, file_type=8, levels=_span(-16, 15), write=layouts.pack_q5_0)
Q6_K = Scaled(format=layouts.Q6_K, file_type=18, levels=_span(-32, 31), write=layouts.pack_q6_k)
Q8_0 = Scaled(format=layouts.Q8_0, file_type=7, levels=_span(-128, 127), write=layouts.pack_q8_0)
CARRIERS: tuple[Carrier, ...] = (Q1_0, TQ1_0, TQ2_0, Q2_0, Q2_K, Q3_K, MXFP4, Q4_0, Q4_K, NVFP4, Q5_0, Q6_K,
                                 Q8_0)  # fmt: skip
"""From the smallest to the largest"""


def carrier_of(name: str, tensor: PackedTensor) -> Carrier:
    """The smallest type that holds a tensor exactly.

    Raises:
        UserError: none does.
    """
    reasons: dict[str, list[str]] = {}
    for carrier in CARRIERS:
        reason = carrier.fits(tensor)
        if reason is None:
            return carrier
        if carrier.holds(tensor):
            reasons.setdefault(reason, []).append(carrier.format.name)
    grid, (rows, width) = tensor.grid, tensor.codes.shape
    values = f"the codes {grid.low} to {grid.high}{f' + {grid.offset}' if grid.offset else ''}"
    zeros = " with zero points" if tensor.zeros is not None else ""
    what = f"{name} [{rows}, {width}], {values}{zeros}, a scale for each {tensor.group} of a row,"
    if not reasons:
        raise UserError(f"{what} fits no type of llama.cpp exactly; quantize it to a symmetric grid of 2 to 8 bits")
    if isinstance(grid, Float4):
        why = ", ".join(f"{' and '.join(names)} {reason}" for reason, names in reasons.items())
        raise UserError(f"{name} [{rows}, {width}], in floats of 4 bits, fits no type of llama.cpp exactly ({why})")
    why = ", ".join(f"{' and '.join(names)} {reason}" for reason, names in reasons.items())
    raise UserError(
        f"{what} fits no type of llama.cpp exactly ({why}); use PerChannel() or PerGroup(size=256), "
        "scale_type='float16' and a model whose widths are multiples of 256"
    )
