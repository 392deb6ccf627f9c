"""Sequences by number: random access to the rows of a packed split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slmjax.data.extra import Origin
from slmjax.data.packing import Packing, Plan, plan
from slmjax.data.recipe import digest
from slmjax.data.token_store import Split, TokenStore
from slmjax.data.weighting import EveryToken, Weighting
from slmjax.errors import DataError
from slmjax.serialise import to_json
from slmjax.types import Batch

PLAN_VERSION = 1  # raise it when packing gives other rows than before, so that old plans are not used


class Rows:
    """The sequences of one packed split, as arrays. Pickled without its open files, for processes that read ahead."""

    def __init__(self, store: TokenStore, split: Split, packing: Packing, length: int, cache: Path):
        key = digest([store.fingerprint, split, to_json(packing), length, PLAN_VERSION])[:32]
        self.length = length
        self._store = store.fingerprint
        self._split: Split = split
        self._plan_of = (packing, length, cache / "plans" / key)
        self._tokens = store.tokens(split)
        self._plan: Plan | None = None
        self.count = len(self._open(store.offsets(split)))
        if self.count == 0:
            raise DataError(f"{store.location}: its {split} split is empty; raise Recipe.validation or add text")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}

    def _open(self, offsets: Iterator[np.ndarray] | tuple[()] = ()) -> Plan:
        if self._plan is None:
            packing, length, folder = self._plan_of
            self._plan = plan(packing, offsets, length, folder)
        return self._plan

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of documents in a row (`packing.PIECE_DTYPE`)."""
        pieces, rows = self._open()
        return pieces[rows[row] : rows[row + 1]]

    def origin(self, row: int) -> Origin:
        """Where the tokens of a row lie."""
        index, at = np.full(self.length, -1, np.int64), 0
        for start, length in self.pieces(row)[["start", "length"]].tolist():
            index[at : at + length] = np.arange(start, start + length)
            at += length
        return Origin(self._store, self._split, index)

    def begin(self, row: int) -> list[Read]:
        """Start to read a row: neighbouring pieces in one read."""
        pieces = self.pieces(row)
        stops = pieces["start"] + pieces["length"]
        gap = pieces["start"][1:] != stops[:-1]
        starts, last = pieces["start"][np.append(True, gap)], np.append(gap, True)
        # one token more where the document goes on: it is the target of the last one
        ahead = pieces["ends"][last] == 0
        return [
            Read(a, b + more, b - a, self._tokens.read(a, b + more))
            for a, b, more in zip(starts.tolist(), stops[last].tolist(), ahead.tolist(), strict=True)
        ]

    def finish(self, row: int, reads: list[Read], out: Batch, i: int) -> None:
        """Fill row i of `out`, which must be zero before. Weights are 1 where there is a target, else 0."""
        at = 0
        for start, stop, inputs, future in reads:
            values = self._tokens.result(future, start, stop)
            out.tokens[i, at : at + inputs] = values[:inputs]
            out.targets[i, at : at + len(values) - 1] = values[1:]
            at += inputs
        pieces = self.pieces(row)
        ends = np.cumsum(pieces["length"], dtype=np.int64)
        stopped = ends[pieces["ends"] == 1] - 1
        out.weights[i, :at] = 1.0
        out.weights[i, stopped] = 0.0
        out.targets[i, stopped] = 0
        opened = np.repeat(np.cumsum(pieces["opens"]), pieces["length"])
        out.segment_ids[i, :at] = opened
        out.positions[i, :at] = np.arange(at) - (ends - pieces["length"])[pieces["opens"] == 1][opened - 1]


class Read(NamedTuple):
    """A pending read of the tokens [start, stop); the first `inputs` of them are inputs."""

    start: int
    stop: int
    inputs: int
    future: Any


def assemble(
    rows: Sequence[tuple[Rows, int]],
    length: int,
    size: int | None = None,
    *,
    weighting: Weighting = EveryToken(),  # noqa: B008
) -> Batch:
    """Rows as one batch of numpy arrays [size, length]; every read is started before the first is awaited.
    Rows beyond those given are padding, of weight 0."""
    shape = (size or len(rows), length)
    out = empty_batch(*shape)
    pending = [part.begin(row) for part, row in rows]
    for i, ((part, row), reads) in enumerate(zip(rows, pending, strict=True)):
        part.finish(row, reads, out, i)
    out.weights[...] *= weighting(*map(np.asarray, (out.tokens, out.targets, out.segment_ids, out.positions)))
    return out


def origins(rows: Sequence[tuple[Rows, int]]) -> list[Origin]:
    """Where the tokens of each row lie."""
    return [part.origin(row) for part, row in rows]


def empty_batch(rows: int, length: int) -> Batch:
    """A batch of padding, to be filled: zeros, numpy arrays [rows, length]."""
    tokens, targets, positions, segment_ids = (np.zeros((rows, length), np.int32) for _ in range(4))
    fields: dict[str, Any] = {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": segment_ids}
    return Batch(weights=np.zeros((rows, length), np.float32), **fields)  # pyright: ignore[reportArgumentType]
