"""Bytes and text of local files: plain, .gz or .zst, a line or a chunk at a time."""

from __future__ import annotations

import glob
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slmjax.data.records import Bad, Remark
from slmjax.errors import DataError
from slmjax.files import at

READ_BYTES = 1 << 20


def expand(pattern: str, root: Path) -> list[Path]:
    """The files that a glob relative to `root` matches, sorted by name.

    Raises:
        DataError: none match.
    """
    full = str(root / at(pattern))
    paths = [Path(p) for p in sorted(glob.glob(full, recursive=True))]
    if any(p.is_dir() for p in paths) and not any(p.is_file() for p in paths):
        raise DataError(f"{full}: a folder; name its files with a glob, such as {Path(pattern) / '*'}")
    paths = [p for p in paths if p.is_file()]
    if not paths:
        raise DataError(f"{full}: no such file; a source's path is a glob relative to the recipe file")
    return paths


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A buffered reader over the decompressed bytes of a plain, .gz or .zst file."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")
        if path.suffix == ".zst":
            return io.BufferedReader(_Zstd(path), READ_BYTES)
        return io.BufferedReader(io.FileIO(path), READ_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class _Zstd(io.RawIOBase):
    """Frames of a .zst file as one stream. Unlike the library's reader it notices a file that ends inside a frame."""

    def __init__(self, path: Path):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            compressed = self._file.read(READ_BYTES) if self._frame is None or not self._frame.eof else b""
            if self._frame is not None and self._frame.eof:
                compressed = self._frame.unused_data or self._file.read(READ_BYTES)
                self._frame = None
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._pending = self._frame.decompress(compressed)
            except self._error as error:
                raise OSError(str(error)) from error
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


SEPARATOR = Remark("a separator")
"""Given once by `split_text`, when the separator first occurs"""


def split_text(file: io.BufferedIOBase, separator: str, path: Path) -> Iterator[str | Bad | Remark]:
    """The documents of one text file, in time that grows as its length. Line ends of Windows become "\\n", in the
    text as in the separator. An empty separator makes the file one document."""
    chunks = guarded(iter(lambda: file.read(READ_BYTES), b""), path)
    if not separator:
        yield _document([b"".join(chunks)], path, 1)
        return
    mark = separator.replace("\r\n", "\n").encode()
    # `held` begins the document, `tail` may begin a separator, `cut` half a line end
    held, tail, cut, line, found = [], b"", b"", 1, False
    for chunk in itertools.chain(chunks, [None]):
        window = cut + (chunk or b"")
        cut = b"\r" if chunk and window.endswith(b"\r") else b""
        window = tail + window.removesuffix(cut).replace(b"\r\n", b"\n")
        *done, rest = window.split(mark)
        for piece in done:
            if not found:
                found = True
                yield SEPARATOR
            held.append(piece)
            if any(map(bytes.strip, held)):
                yield _document(held, path, line)
            line += sum(part.count(b"\n") for part in held) + mark.count(b"\n")
            held = []
        keep = min(len(mark) - 1, len(rest)) if chunk else 0
        held.append(rest[: len(rest) - keep])
        tail = rest[len(rest) - keep :]
    if any(map(bytes.strip, held)):
        yield _document(held, path, line)


def guarded(pieces: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines (ended by b"\\n") or chunks of a file, with damage reported as DataError."""
    try:
        yield from pieces
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed: {first_line(error)}; download or copy it again") from error


def _document(pieces: list[bytes], path: Path, line: int) -> str | Bad:
    """A document that begins in this line."""
    raw = b"".join(pieces)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}:{line + raw[: error.start].count(10)}"
        return Bad(where, f"not UTF-8 ({error.reason} near {raw[error.start : error.start + 8]!r})")


def first_line(error: BaseException) -> str:
    """The message of an error of another library, without its details."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
