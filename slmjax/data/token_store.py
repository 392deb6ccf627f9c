"""Tokenised text on disk or in an object store: TensorStore zarr3 arrays with checksums, and a manifest written last.

```
manifest.json                      the store exists once this does
tokenizer.json tokenizer_config.json
train/tokens/       [tokens]        uint16 or uint32, all documents one after another
train/offsets/      [documents + 1] int64: where each document starts; the last is the number of tokens
validation/...                      the same
```
Arrays are sharded (zarr3 `sharding_indexed`): a shard is one file of many small chunks, so that a random read touches
one chunk, and a CRC-32C of each chunk catches damage when it is read. The manifest has the SHA-256 of every shard.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import DataError
from slmjax.files import at

MANIFEST = "manifest.json"
FORMAT = "slmjax token store"
VERSION = 1
CHUNK = 1 << 14  # values: 32 KiB of uint16, what one random read costs
SHARD = 1 << 25  # values: 64 MiB of uint16 a file
CACHE_BYTES = 4 << 20  # of an open array: its shard indices (32 KiB each); randomly read chunks are seldom read again

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def url_of(location: str | Path) -> str:
    """A path or URL as a URL of a folder."""
    text = str(location)
    url = text if "://" in text else at(text).resolve().as_uri()
    return url.rstrip("/") + "/"


def files_of(location: str | Path) -> ts.KvStore:
    """The files of a folder, local or remote.

    Raises:
        DataError: the URL cannot be opened.
    """
    try:
        return ts.KvStore.open(url_of(location)).result()
    except ValueError as error:
        raise DataError(f"{location}: cannot be opened: {error}") from error


def read_file(files: ts.KvStore, name: str) -> bytes | None:
    """The bytes of one file, or None where there is none."""
    result = files.read(name).result()
    return bytes(result.value) if result.state == "value" else None


class Array:
    """A one-dimensional sharded array. Opened on first use, so that it can be sent to another process."""

    def __init__(self, location: str, name: str, *, shard: int = SHARD):
        self.location, self.name, self.shard = location, name, shard
        self._opened: ts.TensorStore | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def create(
        self, size: int, dtype: Any, *, chunk: int = CHUNK, compression: Mapping[str, Any] | None = None
    ) -> ts.TensorStore:
        """A new array, or the one that an interrupted build left.

        Args:
            chunk: values of one chunk; divides `shard`.
            compression: a codec of zarr3 that each chunk is compressed by.
        """
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        compressed = [] if compression is None else [dict(compression)]
        sharding = {
            "chunk_shape": [chunk],
            "codecs": [little, *compressed, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        metadata = {
            "shape": [size],
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        # Chunks of zeros are written too: a chunk that is not there is one that was lost.
        spec = self._spec() | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return ts.open(spec, create=True, open=True).result()

    def read(self, start: int, stop: int) -> ts.Future:
        """Begin to read values [start, stop). Pass the future to `result`."""
        return self._array()[start:stop].read()

    def result(self, future: ts.Future, start: int, stop: int) -> np.ndarray:
        """The values of a read that `read` has begun.

        Raises:
            DataError: a shard is missing or damaged; the message names it.
        """
        try:
            return future.result()
        except (ValueError, OSError) as error:
            for shard in range(start // self.shard, -(-stop // self.shard)):
                self._probe(shard, max(start, shard * self.shard), min(stop, (shard + 1) * self.shard))
            raise DataError(f"{self.location}{self.name}: cannot be read: {_short(error)}") from error

    def __getitem__(self, at: slice | int) -> Any:
        """As a numpy array: `[a:b:c]`, `[:]` and negative numbers; one number gives one value.

        Raises:
            IndexError: one number, beyond the end.
            DataError: a shard is missing or damaged.
        """
        where = range(len(self))[at]
        if isinstance(where, int):
            return self.result(self.read(where, where + 1), where, where + 1)[0]
        low, high = (min(where[0], where[-1]), max(where[0], where[-1]) + 1) if where else (0, 0)
        values = self.result(self.read(low, high), low, high)
        return values[:: where.step] if where.step > 0 else values[::-1][:: -where.step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All values, read at once."""
        return np.asarray(self[:], dtype)

    def __len__(self) -> int:
        return self._array().shape[0]

    def shards(self) -> int:
        """Number of shard files."""
        return -(-len(self) // self.shard)

    def shard_name(self, shard: int) -> str:
        """The file of a shard, relative to the store."""
        return f"{self.name}/c/{shard}"

    def _probe(self, shard: int, start: int, stop: int) -> None:
        try:
            self._array()[start:stop].read().result()
        except (ValueError, OSError) as error:
            name = f"{self.location}{self.shard_name(shard)}"
            raise DataError(f"{name}: corrupt shard ({_short(error)}); restore it or build again") from error

    def _spec(self) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": f"{self.location}{self.name}/",
            "context": {"cache_pool": {"total_bytes_limit": CACHE_BYTES}},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }

    def _array(self) -> ts.TensorStore:
        if self._opened is None:
            try:
                self._opened = ts.open(self._spec(), open=True, read=True).result()
            except (ValueError, OSError) as error:
                message = f"{self.location}{self.name}/zarr.json: cannot be opened: {_short(error)}"
                raise DataError(message) from error
        return self._opened


class TokenStore:
    """A finished store. Cheap to open: it reads the manifest and nothing else."""

    def __init__(self, location: str | Path):
        """
        Raises:
            DataError: there is no manifest, or it has another format.
        """
        self.location = url_of(location)
        raw = read_file(files_of(location), MANIFEST)
        if raw is None:
            raise DataError(f"{location}: no token store there (no {MANIFEST}); make one with `slmjax data build`")
        try:
            self.manifest: dict[str, Any] = json.loads(raw)
            if (self.manifest["format"], self.manifest["version"]) != (FORMAT, VERSION):
                raise DataError(f"{location}: {MANIFEST} is not of format {FORMAT!r}, version {VERSION}")
            self.fingerprint: str = self.manifest["fingerprint"]
            self.vocab: int = self.manifest["tokenizer"]["vocab"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{location}: {MANIFEST} is damaged: {error}") from error

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest["tokenizer"]["fingerprint"]

    def count(self, split: Split, what: Literal["tokens", "documents", "bytes"]) -> int:
        """Size of a split. Bytes are those of the cleaned text in UTF-8."""
        return self.manifest["splits"][split][what]

    def tokens(self, split: Split) -> Array:
        """The token ids of a split."""
        return Array(self.location, f"{split}/tokens", shard=self.manifest["shard"])

    def boundaries(self, split: Split) -> Array:
        """Where each document of a split starts and, last, where the last one ends: int64, `documents + 1` values."""
        return Array(self.location, f"{split}/offsets", shard=self.manifest["shard"])

    def offsets(self, split: Split, documents: int = 1 << 16) -> Iterator[np.ndarray]:
        """Document boundaries, int64, in blocks of this many documents; a block begins where the last one ended."""
        array, total = self.boundaries(split), self.count(split, "documents")
        for start in range(0, total, documents):
            yield array[start : min(start + documents, total) + 1]

    @property
    def tokenizer_path(self) -> Path:
        """A local folder with tokenizer.json and tokenizer_config.json."""
        if self.location.startswith("file://"):
            return _local(self.location)
        folder = Path(tempfile.mkdtemp(prefix="slmjax-tokenizer-"))
        files = files_of(self.location)
        for name in TOKENIZER_FILES:
            (folder / name).write_bytes(read_file(files, name) or b"")
        return folder

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the store.

        Raises:
            DataError: tokenizer.json has changed since then.
        """
        recorded = self.manifest["tokenizer"]
        tokenizer = Tokenizer.load(self.tokenizer_path, bos=recorded["bos"] or "", eos=recorded["eos"] or "")
        if tokenizer.fingerprint != recorded["fingerprint"]:
            raise DataError(
                f"{self.location}tokenizer.json is not the one that wrote this store (fingerprint "
                f"{tokenizer.fingerprint[:12]}, manifest says {recorded['fingerprint'][:12]}); restore it or build "
                "again"
            )
        return tokenizer

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the manifest.

        Raises:
            DataError: names the first shard that differs.
        """
        files = files_of(self.location)
        for split in self.manifest["splits"].values():
            for name, expected in split["shards"].items():
                raw = read_file(files, name)
                found = "no such file" if raw is None else hashlib.sha256(raw).hexdigest()
                if found != expected:
                    message = f"corrupt shard (sha256 {found}, manifest says {expected}); restore it or build again"
                    raise DataError(f"{self.location}{name}: {message}")


def _local(url: str) -> Path:
    from urllib.parse import unquote, urlparse

    return Path(unquote(urlparse(url).path))


def _short(error: Exception) -> str:
    """TensorStore's messages append a trail of source positions: the cause comes first."""
    return str(error).split(" [")[0].split("\n")[0]
