"""Where documents come from. A source is a frozen value; `documents()` streams its text and never holds a file whole.

Paths are globs, relative to the folder of the recipe file. Licence and origin go into the manifest of the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slmjax.data.reading import SEPARATOR, expand, first_line, guarded, open_bytes, split_text
from slmjax.data.records import FIRST, UNKNOWN, Bad, Remark, Report, keys_twice
from slmjax.errors import DataError
from slmjax.files import at

LOOK = 100_000
"""Good documents that are read on after a bad record, to name more of them"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources have in common."""

    licence: str = UNKNOWN
    """SPDX name or a sentence; copied to the manifest and the model card"""
    name: str = ""
    """Defaults to the path"""
    origin: str = ""
    """Where the text was taken from: a URL, package or book"""
    limit: int | None = None
    """Read at most this many documents"""
    on_error: Literal["raise", "skip"] = "raise"
    """What a record that is no document does (not JSON, without the field, not UTF-8): ends the build, or is left out
    and counted"""
    max_bad: int = 1000
    """With `on_error="skip"`: more of them end the build all the same"""

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {self.on_error!r}; expected 'raise' or 'skip'")
        if self.max_bad < 0:
            raise DataError(f"max_bad is {self.max_bad}; expected 0 or more records")

    def files(self, root: Path) -> list[Path]:
        """The local files that are read, sorted: their SHA-256 goes into the manifest."""
        raise TypeError(f"{type(self).__name__} is not a source: use Text, JSONL, Parquet, Folder or Hub")

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        """Every document, in a fixed order, and what is found in their place or to be said."""
        raise TypeError(f"{type(self).__name__} is not a source: use Text, JSONL, Parquet, Folder or Hub")

    def documents(self, root: Path, report: Report | None = None) -> Iterator[str]:
        """The documents of `stream`, up to `limit`; `report` gets what else was found.

        Raises:
            DataError: a file is missing or damaged; or there are bad records and `on_error` is "raise" (the first ten
                are named, with file and line), or more than `max_bad`.
        """
        report = Report() if report is None else report
        strict, given, looked = self.on_error == "raise", 0, 0
        for item in self.stream(root) if self.limit != 0 else ():
            if not isinstance(item, str):
                report.add(item)
                if report.bad == FIRST if strict else report.bad > self.max_bad:
                    raise self._refused(report)
            elif strict and report.bad:  # on to the next bad ones, which are named together
                looked += 1
                if looked == LOOK:
                    break
            else:
                yield item
                given += 1
                if given == self.limit:
                    return
        if strict and report.bad:
            raise self._refused(report)

    def _refused(self, report: Report) -> DataError:
        many = f"{report.bad} bad record{'s' if report.bad > 1 else ''}"
        if self.on_error == "skip":
            return DataError(f"{self.title}: {many}, more than max_bad {self.max_bad}: {report.named}")
        them = "the first 10" if report.bad == FIRST else many
        return DataError(f"{report.named} ({them}; mend the file, or leave them out and counted: on_error='skip')")

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

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        files, found = self.files(root), False
        for path in files:
            with open_bytes(path) as file:
                for item in split_text(file, self.separator, path):
                    found = found or item is SEPARATOR
                    if item is not SEPARATOR:
                        yield item
        if self.separator and not found:
            many = "the file" if len(files) == 1 else f"any of {len(files):,} files"
            yield Remark(f"the separator {self.separator!r} does not occur in {many}: each file is one document")


@dataclass(frozen=True, kw_only=True)
class JSONL(Files):
    r"""JSON lines (.jsonl, .jsonl.gz, .jsonl.zst). A line ends at "\n" only: U+2028 inside a string is text."""

    text_field: str = "text"

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        for path in self.files(root):
            with open_bytes(path) as file:
                for number, line in enumerate(guarded(file, path), 1):
                    if not line.strip():
                        continue
                    where = f"{path}:{number}"
                    record = parse_line(line, where)
                    if isinstance(record, Bad):
                        yield record
                        continue
                    for key in record.twice:
                        yield Remark(f"the key {key!r} is twice in an object; the last one counts", where)
                    yield text_of(record.value, self.text_field, where)


@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """Parquet files, read one row group at a time."""

    text_field: str = "text"

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in self.files(root):
            try:
                with pq.ParquetFile(path) as file:
                    if self.text_field not in file.schema_arrow.names:
                        raise DataError(f"{path}: {no_field(self.text_field, file.schema_arrow.names)}")
                    batches = file.iter_batches(batch_size=1024, columns=[self.text_field])
                    values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                    for number, value in enumerate(values, 1):
                        yield text_of({self.text_field: value}, self.text_field, f"{path}: row {number}")
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A local folder of Hugging Face `datasets`: written by `save_to_disk`, or of plain data files."""

    path: str
    split: str = "train"
    text_field: str = "text"

    def files(self, root: Path) -> list[Path]:
        folder = root / at(self.path)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; Folder needs the folder of a Hugging Face dataset")
        return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        import datasets

        folder = root / at(self.path)
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
        """Those of a local copy; none when it is streamed."""
        return sorted(p for p in (root / at(self.path)).rglob("*") if p.is_file())

    def stream(self, root: Path) -> Iterator[str | Bad | Remark]:
        import datasets

        local = root / at(self.path)
        name = str(local) if local.is_dir() else self.path
        try:
            data = datasets.load_dataset(name, self.config, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # the hub's failures share no base class: offline, unknown, gated, wrong config
            raise DataError(f"data set {self.path!r} cannot be opened: {first_line(error)}") from error
        yield from _rows(data, self.text_field, self.path)


class Record(NamedTuple):
    """One object of JSON lines."""

    value: dict[str, Any]
    twice: list[str]
    """Keys that an object in it holds twice"""


def parse_line(line: bytes, where: str) -> Record | Bad:
    """One line of JSONL as an object."""
    try:
        value, twice = keys_twice(line)
    except (ValueError, RecursionError) as error:
        return Bad(where, f"not JSON ({error}); expected one object a line")
    if not isinstance(value, dict):
        return Bad(where, f"expected a JSON object a line, found {type(value).__name__}")
    return Record(value, twice)


def text_of(record: dict[str, Any], field: str, where: str) -> str | Bad:
    """The text of a record. A null is an empty document: cleaning counts and drops it."""
    if field not in record:
        return Bad(where, no_field(field, list(record)))
    value = record[field]
    if value is None:
        return ""
    return (
        value if isinstance(value, str) else Bad(where, f"field {field!r} holds {type(value).__name__}, expected text")
    )


def no_field(field: str, names: list[str]) -> str:
    return f"has no field {field!r}; there are: {', '.join(names)}. Set text_field"


def _rows(data: Any, field: str, where: str) -> Iterator[str | Bad]:
    for number, row in enumerate(data, 1):
        yield text_of(row, field, f"{where}: row {number}")
