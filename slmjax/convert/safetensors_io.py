"""Tensors in safetensors files: written in shards, read lazily, and never trusted.

The format is a length, a JSON header and the raw bytes (github.com/huggingface/safetensors). The library refuses a
header that is too long, overlaps, leaves holes, points outside the file or overflows, and trailing bytes. It accepts
duplicate keys and values that are not finite: both are refused here.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from slmjax.errors import StorageError, UserError

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMES = {"float32": "F32", "bfloat16": "BF16"}
REOPEN_BYTES = 1 << 27  # read between two openings of a file: the pages of a mapping stay in memory until it is closed
DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], *, dtype: str, shard_bytes: int = SHARD_BYTES
) -> list[pathlib.Path]:
    """Writes model.safetensors, or shards of at most `shard_bytes` and an index. Holds one tensor in memory.

    Args:
        dtype: "float32" or "bfloat16" (rounded to nearest even).
        shard_bytes: bytes of data in a shard; a larger tensor gets a shard of its own.

    Returns:
        The files written.

    Raises:
        UserError: a tensor holds NaN or Inf, or overflows in `dtype`.
        StorageError: the disk is full or not writable.
    """
    shards: list[dict[str, int]] = []  # key -> bytes
    shard: dict[str, Any] = {}  # the header of the one being written
    size = 0
    data: BinaryIO | None = None

    def flush() -> None:
        nonlocal shard, size, data
        assert data is not None
        data.close()
        _join(folder / f"shard-{len(shards)}.part", shard, pathlib.Path(data.name))
        shards.append({key: x["data_offsets"][1] - x["data_offsets"][0] for key, x in shard.items()})
        shard, size, data = {}, 0, None

    try:
        for key, tensor in tensors:
            x = np.ascontiguousarray(_cast(tensor, DTYPES[dtype]))
            if not np.isfinite(x).all():
                raise UserError(f"parameter {key} holds NaN or Inf as {dtype}: a diverged model is not exported")
            if shard and size + x.nbytes > shard_bytes:
                flush()
            data = data or (folder / f"shard-{len(shards)}.data").open("wb")
            data.write(x.reshape(-1).view(np.uint8).data)
            offsets = [size, size + x.nbytes]
            shard[key] = {"dtype": NAMES[dtype], "shape": list(x.shape), "data_offsets": offsets}
            size += x.nbytes
        flush()
    except OSError as e:
        raise StorageError(f"cannot write {folder / SINGLE}: {e.strerror or e}") from e
    finally:
        if data is not None:
            data.close()

    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for i, name in enumerate(names):
        (folder / f"shard-{i}.part").rename(folder / name)
    written = [folder / name for name in names]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sum(s.values()) for s in shards)},
            "weight_map": {key: name for name, s in zip(names, shards, strict=True) for key in s},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(folder / INDEX)
    return written


def _join(file: pathlib.Path, shard: dict[str, Any], data: pathlib.Path) -> None:
    """Header and bytes as one file. The bytes come first from the model and the header first in the file."""
    # readers of the format key on the metadata: transformers refuses a file without it
    header = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out, data.open("rb") as f:
        out.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(f, out, 1 << 24)
    data.unlink()


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused as Inf, by name
        return x.astype(dtype, copy=False)


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder, or of one file, by key. Memory-mapped: a tensor is read when it is asked for.

    Raises:
        UserError: there is no safetensors file, only a pickle, or nothing.
        StorageError: a file is missing, truncated, hostile, or does not match the index.
    """

    def __init__(self, path: pathlib.Path):
        self._files: dict[str, Any] = {}
        self._paths: dict[str, pathlib.Path] = {}
        self._where: dict[str, str] = {}
        self._read = 0
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

    def _add(self, file: pathlib.Path) -> set[str]:
        self._paths[file.name] = file
        self._files[file.name] = open_checked(file)
        keys = set(self._files[file.name].keys())
        self._where |= dict.fromkeys(keys, file.name)
        return keys

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            x = self._files[self._where[key]].get_tensor(key)
        except (SafetensorError, TypeError, ValueError, AttributeError) as e:
            raise StorageError(f"{self._where[key]}: tensor {_short(key)} cannot be read: {_line(e)}") from e
        self._read += x.nbytes
        if self._read > REOPEN_BYTES:
            self._read = 0
            self._files[self._where[key]] = open_checked(self._paths[self._where[key]])
        if x.dtype.kind in "fV" and not np.isfinite(x).all():
            raise StorageError(f"{self._where[key]}: tensor {_short(key)} holds NaN or Inf")
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where


def open_checked(file: pathlib.Path) -> Any:
    """A memory-mapped safetensors file whose header is known to be sane.

    Raises:
        StorageError: it is missing, truncated or hostile; the message is one line.
    """
    if not file.is_file():
        raise StorageError(f"{file} is missing")
    try:
        opened = safe_open(file, framework="numpy")
        with file.open("rb") as f:  # the library has checked that the header lies within the file
            header = f.read(int.from_bytes(f.read(8), "little"))
        json.loads(header, object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as e:
        raise StorageError(f"{file} is no valid safetensors file: {_line(e)}") from e
    return opened


def _read_index(file: pathlib.Path) -> dict[str, set[str]]:
    """index.json -> {file name: keys}."""
    try:
        weight_map = json.loads(file.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        pairs = [(str(key), str(name)) for key, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise StorageError(f"{file} is no index of safetensors shards: {_line(e)}") from e
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: an object that repeats a key is refused (readers would disagree on which one counts)."""
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
