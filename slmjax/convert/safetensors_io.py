"""safetensors files: written in shards, read lazily and checked, since files may be damaged or malicious.

The format is a length, a JSON header and the raw bytes (github.com/huggingface/safetensors). The library refuses
headers that are too long or whose tensors overlap, leave gaps, lie outside the file or overflow, and trailing bytes. It
accepts duplicate keys and values that are not finite: both are refused here.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from slmjax.errors import StorageError, UserError

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "uint8": "U8",
         "float8_e4m3fn": "F8_E4M3"}  # fmt: skip
AS_THEY_ARE = ("int32", "int64", "uint8", "float8_e4m3fn")
READ: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""The format's dtype names -> numpy dtypes"""


def write(
    folder: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    unrounded: tuple[str, ...] = (),
) -> list[pathlib.Path]:
    """Writes model.safetensors, or shards of at most `shard_bytes` and an index. Holds one tensor in memory.

    Args:
        dtype: of the floating-point tensors: "float32", "float16" or "bfloat16" (rounded to nearest even). Integers
            and float8_e4m3fn are written as they are.
        shard_bytes: bytes of data in a shard; a larger tensor gets a shard of its own.
        unrounded: endings of the keys of other tensors that are written as they are.

    Returns:
        The files written.

    Raises:
        UserError: a tensor holds NaN or Inf, or overflows in `dtype`, or its key occurs twice.
        StorageError: the disk is full or not writable.
    """
    shards: list[dict[str, np.ndarray]] = []  # key -> an array of the dtype and shape, without its data
    size, written = 0, set()
    try:
        for key, tensor in tensors:
            # The library writes a whole shard at once and copies it twice. The format is simple: the data in order.
            whole = tensor.dtype.name in AS_THEY_ARE or (unrounded and key.endswith(unrounded))
            x = np.ascontiguousarray(tensor if whole else _cast(tensor, DTYPES[dtype]))
            if not np.isfinite(x).all():
                raise UserError(f"parameter {key} holds NaN or Inf as {dtype}: a diverged model is not exported")
            if key in written:
                raise UserError(f"the tensor {key} would be written twice")
            if not shards or (shards[-1] and size + x.nbytes > shard_bytes):
                shards.append({})
                size = 0
            with (folder / f"shard-{len(shards) - 1}.data").open("ab") as data:
                data.write(x.reshape(-1).view(np.uint8).data)
            shards[-1][key] = np.broadcast_to(np.zeros((), x.dtype), np.shape(tensor))
            written.add(key)
            size += x.nbytes
        names = (
            [SINGLE]
            if len(shards) <= 1
            else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        )
        for i, (name, shard) in enumerate(zip(names, shards or [{}], strict=True)):
            _complete(folder / name, folder / f"shard-{i}.data", shard)
    except OSError as e:
        raise StorageError(f"cannot write {folder / SINGLE}: {e}") from e

    files = [folder / name for name in names]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(x.nbytes for shard in shards for x in shard.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        files.append(folder / INDEX)
    return files


def _complete(file: pathlib.Path, data: pathlib.Path, shard: Mapping[str, np.ndarray]) -> None:
    """Writes header and data into one file and removes the data file."""
    # transformers refuses a file without this entry.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, x in shard.items():
        end = at + x.nbytes
        header[key] = {"dtype": NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if data.exists():
            with data.open("rb") as source:
                shutil.copyfileobj(source, out, 2**24)
    data.unlink(missing_ok=True)


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller refuses with the name of the tensor
        return x.astype(dtype, copy=False)


class Described(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: pathlib.Path
    dtype: str
    """The format's own name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file"""


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder, or of one file, by key. Each is read from disk at every access and not kept in memory.

    Raises:
        UserError: there is no safetensors file (only a pickle, or nothing).
        StorageError: a file is missing, truncated, malformed, or does not match the index.
    """

    def __init__(self, path: pathlib.Path):
        self.described: dict[str, Described] = {}
        folder = path if path.is_dir() else path.parent
        if path.is_file():
            self._add(path)
        elif (path / INDEX).is_file():
            for name, keys in _read_index(path / INDEX).items():
                found = self._add(folder / name)
                if found != keys:
                    key = sorted(found ^ keys)[0]
                    place = "in the index but not in the file" if key in keys else "in the file but not in the index"
                    raise StorageError(f"{folder / name}: tensor {_short(key)} is {place}")
        elif (path / SINGLE).is_file():
            self._add(path / SINGLE)
        else:
            raise _nothing_to_read(path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, without reading any tensor."""
        return {key: x.shape for key, x in self.described.items()}

    def _add(self, file: pathlib.Path) -> set[str]:
        open_checked(file)
        header, first = _read_header(file)
        found = {
            key: Described(file, x["dtype"], tuple(x["shape"]), first + x["data_offsets"][0])
            for key, x in header.items()
            if key != "__metadata__"
        }
        self.described |= found
        return set(found)

    def __getitem__(self, key: str) -> np.ndarray:
        file, name, shape, start = self.described[key]
        try:
            # Read, not mapped: pages of a mapped file count as memory of this process, and one that shrinks kills it.
            x = np.fromfile(file, READ[name], math.prod(shape), offset=start).reshape(shape)
        except (OSError, KeyError, ValueError, TypeError) as e:
            why = f"its dtype {name!r} is not known" if name not in READ else _line(e)
            raise StorageError(f"{file.name}: tensor {_short(key)} cannot be read: {why}") from e
        if x.dtype.kind in "fV" and not np.isfinite(x).all():
            raise StorageError(f"{file.name}: tensor {_short(key)} holds NaN or Inf")
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def __contains__(self, key: object) -> bool:
        return key in self.described


def open_checked(file: pathlib.Path) -> Any:
    """A memory-mapped safetensors file with a valid header.

    Raises:
        StorageError: it is missing, truncated or malformed; the message is one line.
    """
    if not file.is_file():
        raise StorageError(f"{file} is missing")
    try:
        opened = safe_open(file, framework="numpy")
        _read_header(file)
    except (SafetensorError, OSError, ValueError) as e:
        raise StorageError(f"{file} is not a valid safetensors file: {_line(e)}") from e
    return opened


def _read_header(file: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the data. The library has checked that the header lies within the file."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(length), object_pairs_hook=unique), 8 + length


def _read_index(file: pathlib.Path) -> dict[str, set[str]]:
    """index.json -> {file name: keys}."""
    try:
        weight_map = json.loads(file.read_bytes(), object_pairs_hook=unique)["weight_map"]
        pairs = [(str(key), str(name)) for key, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise StorageError(f"{file} is not an index of safetensors shards: {_line(e)}") from e
    shards: dict[str, set[str]] = {}
    for key, name in pairs:
        # a name from the index must not lead out of the folder
        if pathlib.PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise StorageError(f"{file}: shard name {_short(name)} is not a plain name ending in .safetensors")
        shards.setdefault(name, set()).add(key)
    return shards


def _nothing_to_read(path: pathlib.Path) -> UserError:
    if not path.exists():
        return UserError(f"{path} does not exist; expected a folder with {SINGLE}")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
    if pickles:
        return UserError(
            f"{path} holds {pickles[0]}, a pickle, which can run any code when it is read; only safetensors are read. "
            "Load it with transformers where you trust it, and save_pretrained() writes safetensors"
        )
    return UserError(f"{path} holds neither {SINGLE} nor {INDEX}")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json that refuses repeated keys (readers would disagree on which one counts)."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_short(repeated)} occurs twice")
    return out


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__
