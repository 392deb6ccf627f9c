"""Files of one JSON object a line that survive a kill of their writer, and `metrics.jsonl`, one of them.

A line is written by one system call, so a killed process leaves whole lines and at most one partial line at the end,
which readers drop and the next writer removes. Floats are written with the digits that give the same float back, bit
for bit. JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and read
back as floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slmjax.errors import StorageError
from slmjax.track.tracker import Tracker

SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(row: Mapping[str, Any]) -> bytes:
    """One object as one line, newline included."""
    return json.dumps({k: _writable(v) for k, v in row.items()}, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _writable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(line: bytes) -> dict[str, Any]:
    """The inverse of `encode`. Raises ValueError for what is not one JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return {k: SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows; none where there is no file. A partial last line, left by a killed writer, is dropped.

    Raises:
        StorageError: a line before the last good one is not JSON.
    """
    return _scan(Path(path))[0]


def _scan(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the number of bytes that they take."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    rows: list[dict[str, Any]] = []
    good = position = 0
    bad = None
    for number, line in enumerate(lines, start=1):
        position += len(line)
        try:
            row = decode(line)
            if not line.endswith(b"\n"):
                raise ValueError("partial line")
        except ValueError:
            bad = bad or number
            continue
        if bad:
            raise StorageError(f"{path}, line {bad} is damaged; remove that line to go on")
        rows.append(row)
        good = position
    return rows, good


class JsonLines:
    """An append-only file of JSON lines. One writer at a time."""

    def __init__(self, path: str | Path, *, durable: bool = False):
        """`durable` waits for the disk after each line, which takes milliseconds; else a crash of the machine, but not
        of the process, can lose the latest lines.

        Raises:
            StorageError: the file cannot be opened, or is damaged before its end.
        """
        self.path = Path(path)
        self.durable = durable
        self._size = _scan(self.path)[1]
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes the row whole or, where the disk is full, not at all.

        Raises:
            StorageError: it cannot be written.
        """
        line = encode(row)
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(0, "the disk is full")
            if self.durable:
                os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise StorageError(f"cannot write {self.path}: {error.strerror}; free some space") from error
        self._size += written

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drops the rows that are not wanted: by a new file and a rename, so that a kill leaves the old or the new.

        Returns the rows kept.

        Raises:
            StorageError: the new file cannot be written.
        """
        rows = read(self.path)
        kept = [row for row in rows if wanted(row)]
        if len(kept) == len(rows):
            return kept
        new = self.path.with_name(self.path.name + ".new")
        try:
            with new.open("wb") as file:
                file.writelines(map(encode, kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
            os.close(self._fd)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise StorageError(f"cannot rewrite {self.path}: {error.strerror}; free some space") from error
        self._size = os.fstat(self._fd).st_size
        return kept

    def close(self) -> None:
        """Further calls do nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Metrics(Tracker):
    """The tracker that writes `metrics.jsonl`.

    A row: `step`; `elapsed`, seconds of training by the monotonic clock, the earlier attempts of the run included;
    `time`, seconds since 1970 by the wall clock; and the metrics.
    """

    def __init__(self, path: str | Path):
        self._lines = JsonLines(path)
        rows = read(path)
        self._before = rows[-1]["elapsed"] if rows else 0.0
        self._start = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises StorageError when the disk is full; the rows before are whole."""
        elapsed = round(self._before + time.monotonic() - self._start, 4)
        self._lines.append({"step": step, "elapsed": elapsed, "time": round(time.time(), 3), **metrics})

    def resume(self, step: int) -> None:
        """Drops the rows of steps after `step`: training repeats them. `elapsed` goes on from the last row kept."""
        rows = self._lines.keep(lambda row: row["step"] <= step)
        self._before = rows[-1]["elapsed"] if rows else 0.0
        self._start = time.monotonic()

    def finish(self, status: str) -> None:
        self._lines.close()
