"""Where documents come from. A source is a frozen value; `documents()` streams its text and never holds a file whole.

Paths are globs, relative to the folder of the recipe file. Licence and origin go into the manifest of the store.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax.data.reading import expand, first_line, guarded, open_bytes, split_text
from slmjax.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources have in common."""

    licence: str
    """SPDX name or a sentence; copied to the manifest and the model card"""
    name: str = ""
    """Defaults to the path"""
    origin: str = ""
    """Where the text was taken from: a URL, package or book"""
    limit: int | None = None
    """Read at most this many documents"""

    def files(self, root: Path) -> list[Path]:
        """The local files that are read, sorted: their SHA-256 goes into the manifest."""
        raise TypeError(f"{type(self).__name__} is not a source: use Text, JSONL, Parquet, Folder or Hub")

    def stream(self, root: Path) -> Iterator[str]:
        """Every document, in a fixed order."""
        raise TypeError(f"{type(self).__name__} is not a source: use Text, JSONL, Parquet, Folder or Hub")

    def documents(self, root: Path) -> Iterator[str]:
        """`stream` up to `limit`.

        Raises:
            DataError: a file is missing, malformed or has no such field; the message names file and line.
        """
        return itertools.islice(self.stream(root), self.limit)

    @property
    def title(self) -> str:
        """The name shown to people."""
        return self.name or str(getattr(self, "path", type(self).__name__))


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Files that the glob `path` matches, relative to the recipe file."""

    path: str

    def files(self, root: Path) -> list[Path]:
        return expand(self.path, root)


@dataclass(frozen=True, kw_only=True)
class Text(Files):
    """Plain text files (.txt, .txt.gz, .txt.zst), UTF-8.

    `separator` ends a document: a blank line by default, "" makes each file one document.
    """

    separator: str = "\n\n"

    def stream(self, root: Path) -> Iterator[str]:
        for path in self.files(root):
            with open_bytes(path) as file:
                yield from split_text(file, self.separator, path)


@dataclass(frozen=True, kw_only=True)
class JSONL(Files):
    r"""JSON lines (.jsonl, .jsonl.gz, .jsonl.zst). A line ends at "\n" only: U+2028 inside a string is text."""

    text_field: str = "text"

    def stream(self, root: Path) -> Iterator[str]:
        for path in self.files(root):
            with open_bytes(path) as file:
                for number, line in enumerate(guarded(file, path), 1):
                    if line.strip():
                        yield text_of(parse_line(line, f"{path}:{number}"), self.text_field, f"{path}:{number}")


@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """Parquet files, read one row group at a time."""

    text_field: str = "text"

    def stream(self, root: Path) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in self.files(root):
            try:
                with pq.ParquetFile(path) as file:
                    if self.text_field not in file.schema_arrow.names:
                        raise _no_field(str(path), self.text_field, file.schema_arrow.names)
                    for batch in file.iter_batches(batch_size=1024, columns=[self.text_field]):
                        for value in batch.column(0).to_pylist():
                            yield text_of({self.text_field: value}, self.text_field, str(path))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A local folder of Hugging Face `datasets`: written by `save_to_disk`, or of plain data files."""

    path: str
    split: str = "train"
    text_field: str = "text"

    def files(self, root: Path) -> list[Path]:
        folder = root / self.path
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; Folder needs the folder of a Hugging Face dataset")
        return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))

    def stream(self, root: Path) -> Iterator[str]:
        import datasets

        folder = root / self.path
        self.files(root)
        saved = any((folder / f).exists() for f in ("dataset_info.json", "dataset_dict.json"))
        try:
            data: Any = (
                datasets.load_from_disk(str(folder))
                if saved
                else datasets.load_dataset(str(folder), split=self.split, streaming=True)
            )
        except (ValueError, FileNotFoundError, OSError) as error:
            raise DataError(f"{folder}: `datasets` cannot read split {self.split!r}: {first_line(error)}") from error
        if isinstance(data, dict):
            if self.split not in data:
                raise DataError(f"{folder}: has no split {self.split!r}; there are: {', '.join(data)}")
            data = data[self.split]
        yield from _rows(data, self.text_field, str(folder))


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A data set on the Hugging Face hub, streamed: only the cleaned text is kept on disk. `path` may also be a
    local copy of its repository.

    Set `revision` to a commit to make the build reproducible.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"

    def files(self, root: Path) -> list[Path]:
        return sorted(p for p in (root / self.path).rglob("*") if p.is_file())  # of a local copy; none when streamed

    def stream(self, root: Path) -> Iterator[str]:
        import datasets

        local = root / self.path
        name = str(local) if local.is_dir() else self.path
        try:
            data = datasets.load_dataset(name, self.config, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # the hub's failures share no base class: offline, unknown, gated, wrong config
            raise DataError(f"data set {self.path!r} cannot be opened: {first_line(error)}") from error
        yield from _rows(data, self.text_field, self.path)


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL as an object.

    Raises:
        DataError: it is not a JSON object.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object a line, found {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text of a record. A null is an empty document: cleaning counts and drops it."""
    if field not in record:
        raise _no_field(where, field, list(record))
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} holds {type(value).__name__}, expected text")
    return value


def _rows(data: Any, field: str, where: str) -> Iterator[str]:
    for row in data:
        yield text_of(row, field, where)


def _no_field(where: str, field: str, names: list[str]) -> DataError:
    return DataError(f"{where}: has no field {field!r}; there are: {', '.join(names)}. Set text_field")
