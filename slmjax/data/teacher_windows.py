"""The windows in which a teacher reads the documents of a store: for each document by itself, from its start."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from slmjax.data.packing import best_fit_decreasing
from slmjax.data.rows import empty_batch
from slmjax.data.token_store import Split, TokenStore
from slmjax.types import Batch


class Windows(NamedTuple):
    """Rows that hold windows, each a segment."""

    batch: Batch
    """Without targets; weights are 0"""
    index: np.ndarray
    """int64 [B, T]: the position of each token in the split; -1 for padding"""


def boundaries(store: TokenStore, split: Split, start: int, stop: int, length: int) -> np.ndarray:
    """Where the windows begin that hold tokens [start, stop) of a split, and last where the last of them ends.

    Args:
        length: tokens of a window. A document is cut at multiples of it from its own start.

    Returns:
        int64 [windows + 1]
    """
    array = store.boundaries(split)
    documents = len(array) - 1
    offset = lambda i: int(array[i : i + 1][0])  # noqa: E731
    first = bisect.bisect_right(range(documents + 1), start, key=offset) - 1
    last = bisect.bisect_left(range(documents + 1), stop, key=offset)
    offsets = array[first : last + 1]
    cuts = [np.arange(a, b, length) for a, b in itertools.pairwise(offsets.tolist())]
    marks = np.append(np.concatenate(cuts), offsets[-1])
    return marks[np.searchsorted(marks, start, "right") - 1 : np.searchsorted(marks, stop, "left") + 1]


def windows(store: TokenStore, split: Split, start: int, stop: int, *, length: int, rows: int) -> Iterator[Windows]:
    """The windows that hold tokens [start, stop) of a split, several short ones in a row.

    Args:
        length: tokens of a window at most, and of a row.
        rows: of each batch; the last one is filled with padding.
    """
    marks = boundaries(store, split, start, stop, length)
    first, sizes = int(marks[0]), np.diff(marks)
    tokens = store.tokens(split)[first : int(marks[-1])].astype(np.int32)
    row_of = best_fit_decreasing(sizes, length)
    order = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of))
    for at in range(0, len(ends), rows):
        batch, index = empty_batch(rows, length), np.full((rows, length), -1, np.int64)
        for i, end in enumerate(ends[at : at + rows].tolist()):
            begin, column = (ends[at + i - 1] if at + i else 0), 0
            for segment, window in enumerate(order[begin:end].tolist(), start=1):
                size = int(sizes[window])
                here = slice(column, column + size)
                index[i, here] = int(marks[window]) + np.arange(size)
                batch.positions[i, here], batch.segment_ids[i, here] = np.arange(size), segment
                column += size
        batch.tokens[index >= 0] = tokens[index[index >= 0] - first]
        yield Windows(batch, index)
