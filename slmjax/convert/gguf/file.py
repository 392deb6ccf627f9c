"""GGUF files: key-value pairs, descriptions of tensors, then their bytes. Read in pieces and checked, since files may
be damaged or malicious.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package allocates whatever sizes
a header claims and takes a second for a large vocabulary, so the header is parsed here: every count is compared with
the bytes that are left before anything is allocated. `layouts` unpacks the formats that an export packs, the package
the others.
"""

from __future__ import annotations

import itertools
import math
import mmap
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from slmjax.convert.gguf.layouts import FORMATS, NAMES, sizes_of
from slmjax.errors import StorageError

VERSIONS = (2, 3)
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
            "Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")  # fmt: skip
MOST_ALIGNMENT = 1 << 16
AT_ONCE = 1 << 21  # values unpacked at a time, which limits the memory needed besides the result
SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip


class Info(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]
    """In numpy's order: the last axis is contiguous in memory (the file lists the axes in reverse)"""
    kind: int
    """The number of its format (`layouts.NAMES`)"""
    start: int
    size: int
    """The data are the bytes [start, start + size) of the file"""


class GGUF(Mapping[str, np.ndarray]):
    """The `metadata` of a file, and its tensors by name, read from disk and unpacked to float32 at every access.

    Values of `metadata` are bool, int, float, str, a list of str, or a numpy array.

    Raises:
        StorageError: the file is not GGUF, truncated or malformed, or a tensor is in a format that is not supported.
    """

    def __init__(self, file: pathlib.Path):
        if not file.is_file():
            raise StorageError(f"{file} is missing; expected a GGUF file")
        self.file = file
        with file.open("rb") as f:
            if file.stat().st_size < 24:
                raise StorageError(f"{file} is not a GGUF file: it has {file.stat().st_size} bytes")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                self.metadata, found = _read_header(_Cursor(mapped, file))
        self.infos, self._scales = _scales_apart(found, file)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.infos[name]
        out, i = np.empty((math.prod(info.shape[:-1]), info.shape[-1]), np.float32), 0
        with np.errstate(all="ignore"):  # values that are not finite are refused below
            for raw in self.rows(name):
                out[i : i + len(raw)] = _unpack(raw, info.kind)
                i += len(raw)
            if (scale := self.scale_of(name)) is not None:
                out *= scale
        if not np.isfinite(out).all():
            raise StorageError(f"{self.file}: tensor {_short(name)} holds NaN or Inf")
        return out.reshape(info.shape)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, uint8 [rows, bytes of a row], some rows at a time.

        Raises:
            StorageError: the file has become shorter.
        """
        info = self.infos[name]
        block, packed = sizes_of(info.kind)
        width, left = info.shape[-1] // block * packed, math.prod(info.shape[:-1])
        # not memory-mapped: the pages of a whole file would stay in memory beside the model
        with self.file.open("rb") as f:
            f.seek(info.start)
            while left:
                some = min(left, max(1, AT_ONCE // info.shape[-1]))
                raw = np.fromfile(f, np.uint8, some * width)
                if len(raw) != some * width:
                    raise StorageError(f"{self.file}: tensor {_short(name)} ends early: the file was changed")
                yield raw.reshape(-1, width)
                left -= some

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, format and bytes."""
        a, b = self.infos[one], self.infos[other]
        if (a.shape, a.kind) != (b.shape, b.kind) or one in self._scales or other in self._scales:
            return False
        return all(np.array_equal(x, y) for x, y in zip(self.rows(one), self.rows(other), strict=True))

    def scale_of(self, name: str) -> np.ndarray | None:
        """The scale of a whole matrix (NVFP4), float32 [1]; None if it has none."""
        if name not in self._scales:
            return None
        return np.fromfile(self.file, "<f4", 1, offset=self._scales[name].start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


class _Cursor:
    """A position in the file, checked never to pass its end."""

    def __init__(self, data: mmap.mmap, file: pathlib.Path):
        self.data, self.file, self.at, self.end = data, file, 0, len(data)

    def fail(self, message: str) -> StorageError:
        return StorageError(f"{self.file}: {message}")

    def take(self, size: int, what: str) -> int:
        """The offset of the next `size` bytes; moves the position behind them. `what`: what they are, for messages."""
        start = self.at
        if size > self.end - start:
            raise self.fail(f"truncated: {what} needs {size} bytes at byte {start}, but the file ends at {self.end}")
        self.at = start + size
        return start

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack_from(f"<{kind}", self.data, self.take(struct.calcsize(kind), what))[0]

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} is not UTF-8: {e}") from None

    def count(self, kind: str, least: int, what: str) -> int:
        """A count of items of at least `least` bytes each, all of which have to fit into the bytes left."""
        n = self.number(kind, what)
        if n * least > self.end - self.at:
            raise self.fail(f"{what} is {n}, more than the {self.end - self.at} bytes left can hold")
        return n


def _read_header(c: _Cursor) -> tuple[dict[str, Any], dict[str, Info]]:
    if (magic := c.data[: c.take(4, "the magic") + 4]) != b"GGUF":
        raise c.fail(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    version = c.number("I", "the version")
    if version not in VERSIONS:
        kind = "big-endian, " if version & 0xFFFF == 0 else ""
        raise c.fail(f"{kind}GGUF version {version} is not supported; expected one of {', '.join(map(str, VERSIONS))}")
    tensors = c.count("Q", 8 + 4 + 8 + 4 + 8, "the number of tensors")
    pairs = c.count("Q", 8 + 4 + 1, "the number of keys")
    metadata: dict[str, Any] = {}
    for i in range(pairs):
        key = c.text(f"the name of key {i}")
        if key in metadata:
            raise c.fail(f"the key {_short(key)} occurs twice")
        metadata[key] = _value(c, c.number("I", f"the type of {_short(key)}"), f"the key {_short(key)}")
    parts = metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise c.fail(f"it is one of {shown(parts)} parts; join them first (llama-gguf-split --merge)")
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for i in range(tensors):
        name = c.text(f"the name of tensor {i}")
        if name in described:
            raise c.fail(f"the tensor {_short(name)} occurs twice")
        described[name] = _describe(c, f"tensor {_short(name)}")
    return metadata, _place(c, described, metadata.get("general.alignment", 32))


def _value(c: _Cursor, kind: int, what: str) -> Any:
    if kind == GGUFValueType.STRING:
        return c.text(what)
    if kind == GGUFValueType.ARRAY:
        inner = c.number("I", what)
        if inner == GGUFValueType.STRING:
            return [c.text(what) for _ in range(c.count("Q", 8, f"the length of {what}"))]
        dtype = _scalar(c, inner, what)
        n = c.count("Q", dtype.itemsize, f"the length of {what}")
        start = c.take(n * dtype.itemsize, what)
        return np.frombuffer(c.data[start : c.at], dtype)
    dtype = _scalar(c, kind, what)
    start = c.take(dtype.itemsize, what)
    return np.frombuffer(c.data[start : c.at], dtype)[0].item()


def _scalar(c: _Cursor, kind: int, what: str) -> np.dtype:
    if kind not in SCALARS:
        raise c.fail(f"{what} has the unknown type {kind}")
    return np.dtype(SCALARS[GGUFValueType(kind)])


def _describe(c: _Cursor, what: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, format, and offset from the first tensor."""
    axes = c.number("I", what)
    if not 1 <= axes <= 4:
        raise c.fail(f"{what} has {axes} axes; expected 1 to 4")
    shape = tuple(c.number("Q", what) for _ in range(axes))[::-1]
    number = c.number("I", what)
    name = NAMES.get(number, str(number))
    if name not in READABLE:
        raise c.fail(f"{what} has the unknown quantization {name}; expected one of {', '.join(READABLE)}")
    return shape, number, c.number("Q", what)


def _place(c: _Cursor, described: Mapping[str, tuple[Any, Any, int]], alignment: Any) -> dict[str, Info]:
    """Checks that each tensor lies within the file and that none overlap."""
    if not (isinstance(alignment, int) and 0 < alignment <= MOST_ALIGNMENT and alignment & (alignment - 1) == 0):
        raise c.fail(f"general.alignment is {shown(alignment)}; expected a power of two up to {MOST_ALIGNMENT}")
    data = -(-c.at // alignment) * alignment
    infos = {}
    for name, (shape, kind, offset) in described.items():
        block, packed = sizes_of(kind)
        if 0 in shape or shape[-1] % block:
            raise c.fail(f"tensor {_short(name)} of shape {list(shape)} is not a whole number of {NAMES[kind]} blocks")
        size = math.prod(shape) // block * packed
        start = data + offset
        if offset % alignment or start + size > c.end:
            raise c.fail(
                f"truncated: tensor {_short(name)} of shape {list(shape)} takes bytes {start} to {start + size}, "
                f"but the file ends at {c.end}"
                if offset % alignment == 0
                else f"tensor {_short(name)} does not begin at a multiple of {alignment} bytes"
            )
        infos[name] = Info(shape, kind, start, size)
    order = sorted(infos.items(), key=lambda item: item[1].start)
    for (name, one), (after, other) in itertools.pairwise(order):
        if one.start + one.size > other.start:
            raise c.fail(f"the tensors {_short(name)} and {_short(after)} overlap")
    return infos


def _scales_apart(infos: dict[str, Info], file: pathlib.Path) -> tuple[dict[str, Info], dict[str, Info]]:
    """The tensors of a file, and those that are the scale of an NVFP4 matrix, by the name of the matrix. Dropped are
    scales of its inputs, which concern runtimes that round activations to 4 bits.

    Raises:
        StorageError: a scale is not one float32.
    """
    rest, scales = dict(infos), {}
    for name in [name for name, info in infos.items() if NAMES[info.kind] == "NVFP4"]:
        stem = name.removesuffix(".weight")
        rest.pop(f"{stem}.input_scale", None)
        scale = rest.pop(f"{stem}.scale", None)
        if scale is None:
            continue
        if scale.shape != (1,) or NAMES[scale.kind] != "F32":
            raise StorageError(
                f"{file}: tensor {_short(f'{stem}.scale')} is {NAMES[scale.kind]} {list(scale.shape)}; expected one F32"
            )
        scales[name] = scale
    return rest, scales


def _unpack(raw: np.ndarray, kind: int) -> np.ndarray:
    """Bytes [rows, bytes of a row] -> values, float32 [rows, values of a row]."""
    if kind not in FORMATS:
        return dequantize(raw, GGMLQuantizationType(kind))
    return FORMATS[kind].unpack(raw.reshape(-1, FORMATS[kind].size)).reshape(len(raw), -1)


def shown(value: Any) -> str:
    """A metadata value for a message: one line, cut off if it is long."""
    return "missing" if value is None else _cut(" ".join(repr(value).split()), 60)


def named(metadata: Mapping[str, Any], key: str, default: str | None = None) -> str | None:
    """A metadata value that has to be a string.

    Raises:
        StorageError: it is of another type.
    """
    value = metadata.get(key, default)
    if value is not None and not isinstance(value, str):
        raise StorageError(f"{key} = {shown(value)} is not a string")
    return value


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _short(name: str) -> str:
    return repr(_cut(name, 120))
