"""A table of runs: read from CSV or TSV, checked, and ready to be fitted."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from slmjax.errors import DataError, UserError

NAMES = {  # a column's name -> what it is also called in tables that others have published
    "params": ("n", "parameters", "n_params", "model_size", "params_active_precise"),
    "tokens": ("d", "n_tokens", "training_tokens", "train_tokens"),
    "flops": ("c", "compute", "training_flop", "training_flops"),
    "loss": ("l", "final_loss", "val_loss", "validation_loss"),
    "params_nonembedding": ("params_no_embed", "n_nonembedding", "params_without_embeddings"),
    "layers": ("depth",),
    "length": ("context", "sequence_length"),
}
BITS = ("bits", "bits_activations", "bits_cache")
POSITIVE = ("params", "tokens", "flops", "loss", "unique_tokens", "teacher_loss", *BITS)
BLANK: dict[str, str | float] = {"unique_tokens": "tokens", **dict.fromkeys(BITS, 16.0)}
"""What an empty cell means, where it means something: no repetition, 16 bits"""
FLOPS_PER_PRODUCT = 6.0
"""Training FLOPs of a parameter and token: 2 forward, 4 backward"""
SAME_BUDGET = 1.2
"""Runs whose FLOPs differ by at most this factor have one budget"""


@dataclass(frozen=True)
class Runs:
    """Runs to fit.

    Attributes:
        columns: numbers by name, each [n]: params, tokens, flops, loss, and what else the table has.
        skipped: how many rows are not among the columns: of runs that diverged, failed, are unfinished or held out.
        source: the file, for messages.
    """

    columns: Mapping[str, np.ndarray]
    skipped: int = 0
    source: str = "the runs"

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, which: np.ndarray) -> Runs:
        """Some of the runs: a mask or indices."""
        return Runs({name: values[which] for name, values in self.columns.items()}, self.skipped, self.source)

    def varies(self, name: str) -> bool:
        return name in self.columns and len(np.unique(self.columns[name])) > 1

    @cached_property
    def cost(self) -> float:
        """k of flops = k * params * tokens: the median over runs; 6 by convention."""
        return float(np.median(self["flops"] / self["params"] / self["tokens"]))

    @cached_property
    def repeats(self) -> bool:
        """Whether some run saw data more than once."""
        return "unique_tokens" in self.columns and bool((self["unique_tokens"] < self["tokens"] * (1 - 1e-9)).any())

    @cached_property
    def budgets(self) -> tuple[np.ndarray, ...]:
        """Indices of the runs of each budget, the smallest first: groups of runs with FLOPs within 20%. Empty if the
        FLOPs of the runs are no budgets but spread without gaps."""
        order = np.argsort(self["flops"], kind="stable")
        logs = np.log(self["flops"][order])
        gaps = np.flatnonzero(np.diff(logs) > math.log(SAME_BUDGET)) + 1
        groups = np.split(order, gaps)
        spread = any(np.ptp(np.log(self["flops"][group])) > math.log(SAME_BUDGET) for group in groups)
        return () if spread else tuple(groups)

    @cached_property
    def cells(self) -> np.ndarray:
        """Which runs differ in their seed alone: the same number, [n]."""
        settings = [values for name, values in self.columns.items() if is_setting(name)]
        return np.unique(np.stack(settings, -1), axis=0, return_inverse=True)[1].reshape(-1)


def read(path: str | Path) -> Runs:
    """Reads a table of runs: CSV, or TSV if the name ends so, with a header.

    Columns are loss (nats a token), and two of params, tokens, flops; the third follows from flops = 6 params tokens.
    `NAMES` lists other names that are understood. Optional: unique_tokens, bits, bits_activations, bits_cache,
    teacher_loss, seed, metric (a downstream score), and whatever else consists of numbers. Rows whose `status` is
    anything but done are left out and counted.

    Raises:
        DataError: a column is missing; a number is missing, not a number, or not positive; a cell is there twice. The
            message has the line.
        StorageError, OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give a CSV or TSV file of runs") from None
    rows = csv.reader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
    header = [_canonical(name) for name in next(rows, [])]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{path}: the column {twice[0]} is there twice (a table may call it {_spellings(twice[0])})")
    lines, table, skipped = [], [], 0
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise DataError(f"{path}, line {rows.line_num}: {len(row)} values; the header names {len(header)} columns")
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        if cells.get("status", "done").lower() not in ("", "done", "ok", "finished"):
            skipped += 1
            continue
        lines.append(rows.line_num)
        table.append(cells)
    if not table:
        raise DataError(f"{path}: no runs; expected a header with params, tokens, loss and a line for each run")
    numbers = {name: column for name in header if (column := _numbers(name, table, lines, path)) is not None}
    return check(_complete(numbers, path), skipped, str(path), lines)


def table(columns: Mapping[str, Sequence[float] | np.ndarray], source: str = "the runs") -> Runs:
    """Runs from columns in memory, checked as `read` does."""
    numbers = {_canonical(name): np.asarray(values, np.float64) for name, values in columns.items()}
    return check(_complete(numbers, source), 0, source)


def check(columns: dict[str, np.ndarray], skipped: int, source: str, lines: Sequence[int] | None = None) -> Runs:
    """Runs, if every number is usable and no cell is there twice.

    Raises:
        DataError: as `read`.
    """

    def where(i: int) -> str:
        return f"{source}, line {lines[i]}" if lines else f"{source}, run {i + 1}"

    for name, blank in BLANK.items():
        if name in columns:
            other = columns[blank] if isinstance(blank, str) else np.full(len(columns["loss"]), blank)
            columns[name] = np.where(np.isnan(columns[name]), other, columns[name])
    for name in POSITIVE:
        if name in columns and (bad := np.flatnonzero(~((columns[name] > 0) & np.isfinite(columns[name])))).size:
            value = columns[name][bad[0]]
            fix = "remove the line, or give it a status of diverged" if name == "loss" else "mend the line"
            raise DataError(f"{where(int(bad[0]))}: {name} is {value:g}; expected a finite number above 0; {fix}")
    if "seed" in columns:
        columns["seed"] = np.nan_to_num(columns["seed"], nan=0.0)
    settings = np.stack([values for name, values in columns.items() if is_setting(name) or name == "seed"], -1)
    _, first, which = np.unique(settings, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    for i in range(len(which)):
        if (original := int(first[which[i]])) != i:
            raise DataError(
                f"{where(i)}: the same cell as {where(original).rpartition(', ')[2]} (params {columns['params'][i]:g}, "
                f"tokens {columns['tokens'][i]:g}); remove one, or add a column seed if they are replicates"
            )
    return Runs(columns, skipped, source)


def drop_highest(runs: Runs, count: int) -> Runs:
    """Without the `count` runs of the highest loss (which did not train well; Besiroglu et al. 2024 drop 5)."""
    if not 0 <= count < len(runs):
        raise UserError(f"{count} runs of the highest loss cannot be dropped of {len(runs)}")
    kept = np.argsort(runs["loss"], kind="stable")[: len(runs) - count]
    return runs.take(np.sort(kept))


def is_setting(name: str) -> bool:
    """Whether a column says what a run was, and not what came out or which seed it had."""
    return not name.startswith(("loss", "seed", "flops", "metric", "seconds", "time"))


def _canonical(name: str) -> str:
    name = "_".join(name.strip().lower().split())
    return next((known for known, others in NAMES.items() if name in others), name)


def _spellings(name: str) -> str:
    return ", ".join((name, *NAMES.get(name, ())))


def _numbers(name: str, table: Iterable[Mapping[str, str]], lines: Sequence[int], path: Path) -> np.ndarray | None:
    """A column as numbers [n], empty cells nan; None if it is text, or of no interest here."""
    known = name in POSITIVE or name in ("seed", "metric")
    out = []
    for cells, line in zip(table, lines, strict=True):
        try:
            out.append(float(cells[name]) if cells[name] else math.nan)
        except ValueError:
            if known:
                raise DataError(f"{path}, line {line}: {name} is {cells[name]!r}; expected a number") from None
            return None
    values = np.asarray(out)
    return values if known or (name and np.isfinite(values).all()) else None


def _complete(columns: dict[str, np.ndarray], source: str | Path) -> dict[str, np.ndarray]:
    """With flops = 6 params tokens for the one of the three that is missing."""
    there = [name for name in ("params", "tokens", "flops") if name in columns]
    if "loss" not in columns or len(there) < 2:
        lacks = [name for name in ("loss", "params", "tokens") if name not in columns]
        if "flops" in columns and "loss" in columns:
            lacks = [" or ".join(name for name in ("params", "tokens") if name not in columns)]
        also = "; ".join(f"{name} may be called {_spellings(name)}" for name in lacks if name in NAMES)
        has = ", ".join(columns) or "none"
        raise DataError(f"{source}: no column {', '.join(lacks)}; it has {has}{f' ({also})' if also else ''}")
    k = FLOPS_PER_PRODUCT
    if "flops" not in columns:
        columns["flops"] = k * columns["params"] * columns["tokens"]
    elif "tokens" not in columns:
        columns["tokens"] = columns["flops"] / (k * columns["params"])
    elif "params" not in columns:
        columns["params"] = columns["flops"] / (k * columns["tokens"])
    return columns
