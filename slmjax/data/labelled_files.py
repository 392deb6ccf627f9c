"""Texts with labels from CSV, JSON lines and Parquet. A mistake in a file is reported with file, row and column."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmjax.data.reading import expand, first_line, guarded, open_bytes
from slmjax.data.records import Bad
from slmjax.data.sources import parse_line
from slmjax.errors import DataError
from slmjax.files import at

PACKED = (".gz", ".zst")


class Example(NamedTuple):
    """A text and its label, as the file has them."""

    text: str
    label: str
    where: str
    """File and row, for messages"""


def examples(path: Path, text: str, label: str) -> Iterator[Example]:
    """The rows of one file, in order; the columns `text` and `label` are read and no others.

    The suffix decides the format: .csv (with a header; RFC 4180: quotes, line ends inside quotes), .jsonl (a line
    ends at "\\n" only), both also .gz or .zst; .parquet. Labels are strings or whole numbers.

    Raises:
        DataError: the file has another format or is damaged, a column is missing, a row has too few or too many fields,
            or a text or label is empty, not UTF-8 or of another type.
    """
    suffix = (path.with_suffix("") if path.suffix in PACKED else path).suffix
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if suffix not in readers or (suffix == ".parquet" and path.suffix in PACKED):
        raise DataError(f"{path}: of an unknown format; expected .csv or .jsonl (also .gz, .zst), or .parquet")
    for number, row in enumerate(readers[suffix](path, (text, label)), 1):
        where = f"{path}: row {number}"
        yield Example(_text(row[0], text, where), _label(row[1], label, where), where)


def files_of(places: Sequence[str], cache: Path) -> list[Path]:
    """The files of globs, relative to the working directory; a Python file is run and fetches them.

    A Python file (.py) defines `def fetch(folder: Path) -> Path | list[Path]`, which brings the files into `folder`
    unless they are there, and returns their paths.

    Raises:
        DataError: no file matches.
        UserError: the Python file fails.
    """
    files: list[Path] = []
    for place in places:
        if place.endswith(".py"):
            files += _fetched(at(place), cache)
            continue
        try:
            files += expand(place, Path())
        except DataError:
            raise DataError(f"{place}: no such file; data.train and data.validation name files, or globs") from None
    return files


def _fetched(file: Path, cache: Path) -> list[Path]:
    import runpy

    from slmjax.user_code import mistakes_in

    if not file.is_file():
        raise DataError(f"{file}: no such file; expected Python with `def fetch(folder)`")
    with mistakes_in(file, str(file)):
        fetch = runpy.run_path(str(file), run_name="slmjax_recipe").get("fetch")
        if not callable(fetch):
            raise DataError(f"{file}: has no function fetch(); expected `def fetch(folder: Path) -> Path`")
        folder = cache / "files" / file.stem
        folder.mkdir(parents=True, exist_ok=True)
        fetched: Any = fetch(folder)
    return [fetched] if isinstance(fetched, Path) else list(fetched)


def _csv(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    with open_bytes(path) as file:
        # bytes that are not UTF-8 survive as halves of surrogate pairs, which `_text` finds in their column
        lines = (line.decode("utf-8", "surrogateescape") for line in guarded(file, path))
        before = csv.field_size_limit(sys.maxsize)  # the module's own limit is shorter than some texts
        try:
            yield from _csv_rows(path, csv.reader(lines, strict=True), columns)
        finally:
            csv.field_size_limit(before)


def _csv_rows(path: Path, reader: Any, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    number = 0
    try:
        header = next(reader, [])
        header[:1] = [name.removeprefix("\ufeff") for name in header[:1]]
        at = [_place(header, name, str(path)) for name in columns]
        for row in reader:
            if not row:
                continue  # a blank line
            number += 1
            if len(row) != len(header):
                raise DataError(
                    f"{path}: row {number} has {len(row)} fields, but the header has {len(header)}; put texts with "
                    "commas or line ends into double quotes"
                )
            yield row[at[0]], row[at[1]]
    except csv.Error as error:
        raise DataError(f"{path}: row {number + 1}: not CSV ({error}); quotes inside a text are doubled") from error


def _jsonl(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    number = 0
    with open_bytes(path) as file:
        for line in guarded(file, path):
            if not line.strip():
                continue
            number += 1
            where = f"{path}: row {number}"
            record = parse_line(line, where)
            if isinstance(record, Bad):
                raise DataError(f"{where}: {record.why}")
            for name in columns:
                _place(list(record.value), name, where)
                if name in record.twice:
                    raise DataError(f"{where} has the key {name!r} twice; leave one of them out")
            yield record.value[columns[0]], record.value[columns[1]]


def _parquet(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for name in columns:
                _place(file.schema_arrow.names, name, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


def _place(names: Sequence[str], name: str, where: str) -> int:
    if name not in names:
        raise DataError(
            f"{where} has no column {name!r}; there are: {', '.join(names) or 'none'}. Set data.text and data.label"
        )
    return list(names).index(name)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}, column {column!r} holds {kind}; expected a text")
    if not value.strip():
        raise DataError(f"{where}, column {column!r} is empty; expected a text (leave the row out)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}, column {column!r} is not UTF-8; convert the file to UTF-8") from None
    return value


def _label(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{where}, column {column!r} holds {value!r}; expected a label: a string or a whole number")
    return _text(str(value), column, where)
