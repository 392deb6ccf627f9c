"""Writes a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from slmjax.convert.gguf.carriers import Carrier
from slmjax.convert.gguf.layouts import NAMES, sizes_of
from slmjax.convert.packed import PackedTensor
from slmjax.errors import StorageError, UserError

KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""dtype -> format of the matrices, and the value of general.file_type"""
ALWAYS_FLOAT32 = ("_norm.weight", "position_embd.weight", "rope_freqs.weight", "rope_factors_long.weight",
                  "rope_factors_short.weight")  # fmt: skip
STANDARD = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}

Tensors = Iterator[tuple[str, np.ndarray | PackedTensor]]


def kind_of(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """The format in which a tensor is written: vectors and norms stay float32, as llama.cpp requires.

    A matrix whose rows are not a whole number of Q8_0 blocks (of 32) is written as float16.
    """
    if len(shape) == 1 or name.endswith(ALWAYS_FLOAT32):
        return GGMLQuantizationType.F32
    kind = KINDS[dtype][0]
    return GGMLQuantizationType.F16 if shape[-1] % sizes_of(kind)[0] else kind


def file_type(shapes: Mapping[str, tuple[int, ...]], dtype: str, carriers: Mapping[str, Carrier]) -> int:
    """general.file_type: the format of most weights. llama.cpp shows it, and reads each tensor by its own."""
    if not carriers:
        return int(KINDS[dtype][1])
    counted: Counter[int] = Counter()
    for key, shape in shapes.items():
        kind = carriers[key].file_type if key in carriers else int(KINDS[dtype][1])
        counted[kind] += math.prod(shape)
    return counted.most_common(1)[0][0]


def pack(name: str, x: np.ndarray, kind: int) -> np.ndarray:
    """A float32 tensor converted to a format.

    Raises:
        UserError: a value is not finite, or overflows in this format.
    """
    x = np.ascontiguousarray(x, np.float32)
    if kind == GGMLQuantizationType.BF16:
        packed = x.astype(ml_dtypes.bfloat16)
    elif kind == GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused below
            packed = x.astype(np.float16)
    else:
        packed = x
    if not np.isfinite(packed).all():
        raise UserError(f"parameter {name} holds NaN or Inf as {NAMES[kind]}: a diverged model is not exported")
    return quantize(packed, GGMLQuantizationType.Q8_0) if kind == GGMLQuantizationType.Q8_0 else packed


def write(
    file: pathlib.Path,
    name: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Callable[[], Tensors],
    dtype: str,
    carriers: Mapping[str, Carrier] | None = None,
) -> None:
    """Writes a file.

    Args:
        name: of the architecture in llama.cpp.
        metadata: bool, int (unsigned), float, str or lists by key.
        shapes: of each tensor, in the order in which `tensors` gives them.
        tensors: yields (name, float32 or packed tensor with axes in numpy's order).
        dtype: of the matrices that are not packed: one of `KINDS`.
        carriers: {name of a packed tensor: the format that holds it}.

    Raises:
        UserError: see `pack`.
        StorageError: the disk is full or not writable.
    """
    carriers = carriers or {}
    kinds = {
        key: carriers[key].format.number if key in carriers else int(kind_of(key, shape, dtype))
        for key, shape in shapes.items()
    }
    try:
        writer = GGUFWriter(file, name)
        writer.add_file_type(file_type(shapes, dtype, carriers))
        writer.add_quantization_version(2)
        for key, value in metadata.items():
            getattr(writer, f"add_{STANDARD[type(value)]}")(key, value)
        for key, shape in shapes.items():
            block, packed = sizes_of(kinds[key])
            # with a type given, the dtype of the array is not looked at; 42 is one that the package does not know
            size = math.prod(shape) // block * packed
            writer.add_tensor_info(key, shape, np.dtype(np.float32), size, raw_dtype=kinds[key])  # pyright: ignore[reportArgumentType]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for (key, x), expected in zip(tensors(), shapes, strict=True):
                assert key == expected, f"{key} came where {expected} was declared"
                raw = carriers[key].pack(x) if isinstance(x, PackedTensor) else pack(key, x, kinds[key]).view(np.uint8)
                writer.write_tensor_data(raw)
        finally:
            writer.close()
    except OSError as e:
        raise StorageError(f"cannot write {file}: {e.strerror or e}") from e
