"""From documents to rows of one length. A packing is a value; its plan is computed once and then read from disk.

A plan lists, row by row, pieces of documents. It needs document lengths only, never tokens, and is written block by
block, so that memory is bounded however large the corpus is. In both packings every token of the corpus is an input
exactly once, and a target exactly once unless it is the first of its document.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PIECE_DTYPE = np.dtype([("start", np.int64), ("length", np.int32), ("ends", np.int8), ("opens", np.int8)])
"""`start`: position of the first token in the split; `length` in tokens; `ends`: the last token of this piece has no
target, for its document (or the corpus) ends there; `opens`: a new segment begins here"""


class Pieces(NamedTuple):
    """Some rows of a plan: `pieces` in row order, and how many belong to each row."""

    pieces: np.ndarray  # PIECE_DTYPE [p]
    counts: np.ndarray  # int64 [rows]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents are laid into rows."""

    def blocks(self, offsets: Iterable[np.ndarray], length: int) -> Iterator[Pieces]:
        """Rows of `length` tokens, block by block.

        Args:
            offsets: int64 arrays; each holds where consecutive documents start and, last, where the last one ends.
                The next array begins with the value that ended the one before.
            length: tokens a row.
        """
        raise TypeError(f"{type(self).__name__} is not a packing: use Concatenate or BestFit")


@dataclass(frozen=True, kw_only=True)
class Concatenate(Packing):
    """One stream of documents, cut every `length` tokens; only the last row is padded.

    Attention and positions still stop at document ends. `cross_document=True` makes each row one segment, in which
    attention runs across documents and the first token of a document is predicted from the one before (GPT-2, GPT-3).
    """

    cross_document: bool = False

    def blocks(self, offsets: Iterable[np.ndarray], length: int) -> Iterator[Pieces]:
        held = np.zeros(0, PIECE_DTYPE)  # pieces of the last row, which may be incomplete
        for block in offsets:
            pieces = np.concatenate([held, self._cut(block, length)])
            row = pieces["start"] // length
            done = np.searchsorted(row, row[-1]) if len(row) else 0
            yield Pieces(pieces[:done], np.unique(row[:done], return_counts=True)[1].astype(np.int64))
            held = pieces[done:]
        if len(held):
            held["ends"][-1] = 1
            yield Pieces(held, np.array([len(held)], np.int64))

    def _cut(self, offsets: np.ndarray, length: int) -> np.ndarray:
        """Documents cut at multiples of `length` of the whole stream."""
        first, last = int(offsets[0]), int(offsets[-1])
        cuts = np.arange(-(-first // length) * length, last, length)
        marks = np.union1d(offsets, cuts)
        pieces = np.zeros(max(0, len(marks) - 1), PIECE_DTYPE)
        pieces["start"] = marks[:-1]
        pieces["length"] = np.diff(marks)
        if self.cross_document:
            pieces["opens"] = pieces["start"] % length == 0
        else:
            pieces["ends"] = np.isin(marks[1:], offsets)
            pieces["opens"] = 1
        return pieces


@dataclass(frozen=True, kw_only=True)
class BestFit(Packing):
    """Best-fit decreasing bin packing: whole documents share a row, only documents longer than a row are cut.

    Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830. Rows are padded where nothing
    fits. Documents are packed block by block, which costs a row or two a block.
    """

    def blocks(self, offsets: Iterable[np.ndarray], length: int) -> Iterator[Pieces]:
        for block in offsets:
            starts, sizes = block[:-1], np.diff(block)
            cuts = np.maximum(1, -(-sizes // length))  # pieces of each document
            document = np.repeat(np.arange(len(sizes)), cuts)
            order = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
            pieces = np.zeros(len(document), PIECE_DTYPE)
            pieces["start"] = starts[document] + order * length
            pieces["length"] = np.minimum(length, sizes[document] - order * length)
            pieces["ends"] = order == cuts[document] - 1
            pieces["opens"] = 1
            pieces = pieces[pieces["length"] > 0]
            bins = best_fit_decreasing(pieces["length"], length)
            by_row = np.argsort(bins, kind="stable")
            yield Pieces(pieces[by_row], np.bincount(bins).astype(np.int64))


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin, counted from 0, of each item: largest item first, into the fullest bin that it still fits.

    Exact, and vectorised over equal sizes: all bins with the same room are filled at once, so that the work is about
    the number of different (size, room) pairs that meet, not the number of items.

    Args:
        sizes: int [n], 1 to `capacity`.
        capacity: size of a bin.
    """
    bins = np.empty(len(sizes), np.int64)
    if not len(sizes):
        return bins
    room: dict[int, list[np.ndarray]] = defaultdict(list)  # free space -> bins with that much
    free = 0  # bit c is set where room[c] is not empty: the lowest set bit from `size` up is the best fit
    opened = 0
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    values, firsts = np.unique(-sizes[order].astype(np.int64), return_index=True)
    for value, items in zip(values, np.split(order, firsts[1:]), strict=True):
        size = -int(value)
        while len(items):
            above = free >> size
            space = size + (above & -above).bit_length() - 1 if above else capacity
            each = space // size
            needed = -(-len(items) // each)
            if above:
                candidates = np.concatenate(room.pop(space))
                free &= ~(1 << space)
            else:
                candidates = np.arange(opened, opened + needed)
                opened += needed
            used, rest = candidates[:needed], candidates[needed:]
            placed = items[: len(used) * each]
            bins[placed] = np.repeat(used, each)[: len(placed)]
            items = items[len(placed) :]
            in_last = len(placed) - (len(used) - 1) * each
            for left, some in ((space, rest), (space - each * size, used[:-1]), (space - in_last * size, used[-1:])):
                if left > 0 and len(some):
                    room[left].append(some)
                    free |= 1 << left
    return bins


class Plan(NamedTuple):
    """Every row of a packed split: row r holds `pieces[rows[r]:rows[r + 1]]`. Both are memory maps."""

    pieces: np.ndarray  # PIECE_DTYPE [p]
    rows: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.rows) - 1


def plan(packing: Packing, offsets: Iterable[np.ndarray], length: int, folder: Path) -> Plan:
    """The plan in `folder`, computed if it is not there. Several processes may call this at once."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".plan-") as building:
            _write(packing, offsets, length, Path(building) / "plan")
            try:
                os.rename(Path(building) / "plan", folder)
            except OSError:  # another process was first; its plan is the same
                if not folder.is_dir():
                    raise
    return Plan(_map(folder / "pieces.bin", PIECE_DTYPE), _map(folder / "rows.bin", np.dtype(np.int64)))


def _write(packing: Packing, offsets: Iterable[np.ndarray], length: int, folder: Path) -> None:
    folder.mkdir()
    total = 0
    with open(folder / "pieces.bin", "wb") as pieces, open(folder / "rows.bin", "wb") as rows:
        rows.write(np.zeros(1, np.int64).tobytes())
        for block in packing.blocks(offsets, length):
            pieces.write(block.pieces.tobytes())
            rows.write((total + np.cumsum(block.counts)).tobytes())
            total += len(block.pieces)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
