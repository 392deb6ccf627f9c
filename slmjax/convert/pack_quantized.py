"""Quantized weights in the format `pack-quantized` of compressed-tensors, which stock transformers loads and vLLM runs.
Floating point numbers of 4 bits have formats of their own: `pack_float4.py`.

Each matrix of a layer [out, in] is stored as `weight_packed` (int32, the codes side by side without gaps),
`weight_scale` and `weight_shape`; config.json says how to read them. Versions of compressed-tensors before 0.17 leave
gaps between codes of 3, 5, 6 and 7 bits; this is the layout since.

The format has zero points, too, but stock transformers (4.57 and 5.23, with compressed-tensors 0.20) does not load
them: before it reads a file it makes them of another shape than they have when packed. So a code is written as its
distance from the zero point, which takes one bit more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from slmjax.compress.quant.bits import pack_bits, unpack_bits
from slmjax.compress.quant.blocks import sides
from slmjax.compress.quant.float4 import Float4
from slmjax.compress.quant.view import Packed
from slmjax.convert import pack_float4, table
from slmjax.convert.pack_float4 import Float4Carrier
from slmjax.convert.packed import PackedTensor, to_theirs
from slmjax.convert.safetensors_io import DTYPES
from slmjax.errors import UserError
from slmjax.models.families.common.rows import Row
from slmjax.tree import flatten, unflatten

METHOD, FORMAT, VERSION = "compressed-tensors", "pack-quantized", "0.17.0"
MIXED = "mixed-precision"  # of a model whose matrices are in several formats
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
ZERO = "weight_zero_point"
"""Read, never written"""
SHAPE_BYTES = 16
"""`weight_shape`: two int64"""
CHUNK = 2**22
"""Codes that are packed at a time: packing spreads each over its bits, one byte a bit"""


def words(n: int, bits: int) -> int:
    """The number of int32 that hold n codes."""
    return -(-n * bits // 32)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in [-2^(bits-1), 2^(bits-1) - 1], [rows, n] -> int32 [rows, words(n, bits)].

    2^(bits-1) is added to each, and the results of a row follow each other bit after bit, the lowest bit first.
    """
    rows, n = codes.shape
    out = np.zeros((rows, 4 * words(n, bits)), np.uint8)
    step = max(1, CHUNK // max(1, n))
    for i in range(0, rows, step):
        stream = pack_bits(codes[i : i + step].astype(np.int16) + 2 ** (bits - 1), bits)
        out[i : i + step, : stream.shape[1]] = stream
    return out.view("<i4").astype(np.int32, copy=False)


def unpack_codes(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """int32 [rows, words(n, bits)] -> int16 [rows, n], the inverse of `pack_codes`."""
    data = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    out = np.empty((len(data), n), np.int16)
    step = max(1, CHUNK // max(1, n))
    for i in range(0, len(data), step):
        out[i : i + step] = unpack_bits(data[i : i + step], bits, n).astype(np.int16) - 2 ** (bits - 1)
    return out


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """How one matrix is stored."""

    bits: int
    """Of a stored code"""
    strategy: Literal["tensor", "channel", "group"] = "channel"
    """What shares a step: the matrix, an output channel, or a group of input channels"""
    group: int | None = None
    """Input channels in a group"""
    shifted: bool = False
    """Whether the zero point is subtracted from a code before it is stored"""
    odd: bool = False
    """Whether a code q is stored as 2 q + 1, with half the step: the format has no values halfway between integers"""

    format = FORMAT
    parts = PACKED, SCALE, SHAPE
    """The last parts of the keys of a matrix"""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of `weight_scale`, for a matrix of this shape [out, in]."""
        groups = 1 if self.group is None else shape[1] // self.group
        return (1,) if self.strategy == "tensor" else (shape[0], groups)

    def bytes(self, shape: Sequence[int], dtype: str) -> int:
        """All that is stored for a matrix [out, in] in a file of this dtype."""
        scales = self.scale_shape(shape)
        steps = DTYPES[dtype].itemsize * math.prod(scales)
        return 4 * shape[0] * words(shape[1], self.bits) + steps + SHAPE_BYTES

    def scales(self, module: str, tensor: PackedTensor, dtype: str) -> np.ndarray:
        """`weight_scale` [out, groups].

        Raises:
            UserError: a step is not exact in the dtype of the file.
        """
        scale = tensor.steps * np.float32(0.5 if self.odd else 1)
        stored = scale.astype(DTYPES[dtype])
        if not np.array_equal(stored.astype(np.float32), scale):
            half = np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
            raise UserError(
                f"{module}: its scales are not exact in {dtype}, so the export would be another model; "
                f"use --dtype float32{' or float16' if half else ''}, or train with scale_type={dtype!r}"
            )
        return stored

    def pack(self, module: str, tensor: PackedTensor, dtype: str) -> dict[str, np.ndarray]:
        """The arrays of one matrix, by the last part of their key. Raises as `scales`."""
        stored = self.scales(module, tensor, dtype)
        codes = 2 * tensor.codes + 1 if self.odd else tensor.codes
        if tensor.zeros is not None:
            codes = codes - np.repeat(tensor.zeros, tensor.group, axis=1)
        return {
            PACKED: pack_codes(codes, self.bits),
            SCALE: stored[:1, 0] if self.strategy == "tensor" else stored,
            SHAPE: np.array(codes.shape, np.int64),
        }

    def json(self) -> dict[str, Any]:
        """`weights` of a group in config.json."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": self.group,
            "dynamic": False,
        }

    def __str__(self) -> str:
        shared = {"tensor": "a scale for each matrix", "channel": "a scale for each output channel"}
        per = shared.get(self.strategy, f"a scale for each {self.group} input channels")
        codes = " (zero points subtracted)" if self.shifted else " (odd codes only)" if self.odd else ""
        return f"int{self.bits}{codes}, {per}"


def unpack(arrays: Mapping[str, np.ndarray], bits: int) -> np.ndarray:
    """The arrays of one matrix -> float32 [out, in]: `weight_scale * (code - zero point)`, rounded once."""
    out, inputs = map(int, arrays[SHAPE])
    codes = unpack_codes(arrays[PACKED], bits, inputs).astype(np.float32)
    scale = arrays[SCALE].astype(np.float32).reshape(-1, arrays[SCALE].shape[-1])
    grouped = codes.reshape(out, scale.shape[1], -1)
    if ZERO in arrays:
        grouped -= unpack_codes(np.ascontiguousarray(arrays[ZERO].T), bits, out).T[..., None]
    return (grouped * scale[..., None]).reshape(out, inputs)


def carrier(module: str, tensor: PackedTensor) -> Carrier | Float4Carrier:
    """The smallest carrier that holds a tensor exactly.

    Raises:
        UserError: there is none.
    """
    grid, shifted, group = tensor.grid, tensor.zeros is not None, None
    if isinstance(grid, Float4):
        return pack_float4.carrier(module, tensor)
    odd = grid.offset == 0.5
    if grid.offset not in (0.0, 0.5) or (odd and shifted):
        raise UserError(f"{module} is on the grid {grid}, which {METHOD} cannot store; export its values as floats")
    low, high = (2 * grid.low + 1, 2 * grid.high + 1) if odd else (grid.low, grid.high)
    if shifted:  # by a zero point anywhere between the smallest and the largest code
        low, high = low - high, high - low
    bits = 1 + max(max(high, 0).bit_length(), max(-low - 1, 0).bit_length())
    if bits > 8:
        kind = (
            "levels and zero points" if shifted else f"levels from {low / 2} to {high / 2} steps" if odd else "levels"
        )
        raise UserError(
            f"{module} has {grid.levels} {kind}, which take {bits} bits in {METHOD}; it has up to 8: "
            "quantize with fewer levels, or without zero points"
        )
    strategy: Literal["tensor", "channel", "group"] = "channel"
    if tensor.steps.shape[1] > 1:
        strategy, group = "group", tensor.group
    elif (tensor.steps == tensor.steps[0]).all():
        strategy = "tensor"
    return Carrier(bits=bits, strategy=strategy, group=group, shifted=shifted, odd=odd)


class Stored(NamedTuple):
    """A matrix in the file."""

    carrier: Carrier | Float4Carrier
    shape: tuple[int, int]


class Writing:
    """The tensors of a file, one at a time: quantized ones packed, others as they are.

    Args:
        params: float32; of quantized parameters, the values of their codes.
        packed: {path of our parameter: its codes} (`ParamView.pack`).
        dtype: of the file.

    Raises:
        UserError: while it is read: a quantized parameter cannot be stored exactly.
    """

    def __init__(self, rows: Sequence[Row], params: Any, packed: Mapping[str, Packed], dtype: str):
        self._rows, self._params, self._packed, self._dtype = rows, params, packed, dtype
        self.stored: dict[str, Stored] = {}
        """Quantized modules, once they have been read"""
        self._plain: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        marks = table.to_theirs(self._rows, outputs(self._params, self._packed))
        theirs = to_theirs(self._rows, self._params, self._packed)
        for key, mark in marks:
            module = key.removesuffix(".weight")
            if mark.any() and (module == key or mark.ndim != 2 or not (mark == mark[:, :1]).all()):
                raise UserError(
                    f"{key} is quantized, but this class of transformers does not keep it as a Linear "
                    f"(GPT-2 keeps its matrices transposed), which is all that {METHOD} packs: "
                    "export GGUF, or train another family"
                )
            _, tensor = next(theirs)
            if not isinstance(tensor, PackedTensor):
                self._plain += [module] if tensor.ndim == 2 and module != key else []
                yield key, tensor
                continue
            how = carrier(module, tensor)
            for suffix, array in how.pack(module, tensor, self._dtype).items():
                yield f"{module}.{suffix}", array
            self.stored[module] = Stored(how, (tensor.codes.shape[0], tensor.codes.shape[1]))

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        groups: dict[Carrier | Float4Carrier, list[str]] = {}
        for module, stored in self.stored.items():
            groups.setdefault(_as_read(stored.carrier), []).append(module)
        everything = [*self.stored, *self._plain]
        formats = {how.format for how in groups}
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "version": VERSION,
            "config_groups": {
                f"group_{i}": {
                    "targets": patterns(modules, everything),
                    "weights": how.json(),
                    "input_activations": None,
                    "output_activations": None,
                    "format": how.format,
                }
                for i, (how, modules) in enumerate(groups.items())
            },
            "ignore": patterns(self._plain, everything),
            "kv_cache_scheme": None,
        }


def _as_read(how: Carrier | Float4Carrier) -> Carrier | Float4Carrier:
    """Carriers that config.json describes alike."""
    if isinstance(how, Float4Carrier):
        return how
    return Carrier(bits=how.bits, strategy=how.strategy, group=how.group)


def patterns(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Modules -> regular expressions of config.json that match them and no others of `everything`; one for all layers
    where that is possible. They do not name the outermost module, which a base model lacks (`model.layers.0` and
    `layers.0`)."""
    others = {_any_number(module) for module in set(everything) - set(modules)}
    found = (re.escape(_inside(module)) if _any_number(module) in others else _any_number(module) for module in modules)
    return [f"re:(.*\\.)?{pattern}$" for pattern in dict.fromkeys(found)]


def _any_number(module: str) -> str:
    return re.sub(r"(?<![^.\\])\d+(?![^.\\])", r"\\d+", re.escape(_inside(module)))


def _inside(module: str) -> str:
    return module.partition(".")[2] or module


def outputs(params: Any, packed: Mapping[str, Packed]) -> Any:
    """Parameters of the same shapes, where each entry of a quantized one is the number of its output channel, from 1
    on; others are 0. A tensor [out, in] made of them has equal entries in each row."""

    def numbers(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path not in packed:
            return np.broadcast_to(np.float32(0), shape)
        ours = sides(packed[path].axes, path).outputs
        sizes = [n if i in ours else 1 for i, n in enumerate(shape)]
        return np.broadcast_to(np.arange(1, np.prod(sizes) + 1, dtype=np.float32).reshape(sizes), shape)

    return unflatten({path: numbers(path, x.shape) for path, x in flatten(params).items()})
