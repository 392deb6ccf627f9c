"""Reads the rows of `models/table.py` in both directions: parameters of a decoder <-> tensors by their key.

Ours stacks the layers on the leading axis; theirs numbers them. With a pattern of n blocks, `layers/i/...` of repeat r
is their layer r * n + i.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from slmjax.errors import StorageError, UserError
from slmjax.models.table import Row
from slmjax.tree import flatten, unflatten

# Masks and tables that old files store beside the parameters; they follow from the configuration.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


class Piece(NamedTuple):
    """One layer of one of our parameters, and how it lies in theirs."""

    path: str
    """Path of ours"""
    repeat: int | None
    """Index on the layer axis; None if the parameter is not stacked"""
    shape: tuple[int, ...]
    """[...] of theirs, this piece alone"""
    pattern: str
    """einops, theirs -> ours"""
    sizes: dict[str, int]
    """Size of each axis named in `pattern`"""

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our parameter (all layers) -> this layer's part of their tensor."""
        left, right = self.pattern.split("->")
        return rearrange(ours if self.repeat is None else ours[self.repeat], f"{right}->{left}", **self.sizes)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """This layer's part of their tensor -> one layer of ours."""
        return rearrange(theirs, self.pattern, **self.sizes)


class Entry(NamedTuple):
    """One tensor of theirs."""

    key: str
    pieces: tuple[Piece, ...]
    """One, or several that lie one after another along `split`"""
    split: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of theirs."""
        first = self.pieces[0].shape
        if len(self.pieces) == 1:
            return first
        fused = sum(p.shape[self.split] for p in self.pieces)
        return (*first[: self.split], fused, *first[self.split + 1 :])


def entries(rows: Sequence[Row], abstract: Any) -> tuple[Entry, ...]:
    """Rows of a family -> one entry for each tensor of theirs.

    Args:
        abstract: the decoder's parameters, or anything of the same tree whose leaves have a shape.

    Raises:
        UserError: a parameter is covered by no row or by two, a row names one that does not exist, or a pattern does
            not fit the shape.
    """
    shapes = {path: tuple(x.shape) for path, x in flatten(abstract).items()}
    paths = [path for row in rows for path in _paths(row)]
    for path, n in Counter(paths).items():
        if path not in shapes:
            raise UserError(f"table: {path} is no parameter of this decoder; there are: {', '.join(shapes)}")
        if n > 1:
            raise UserError(f"table: {path} is covered by {n} rows; expected one")
    if uncovered := [path for path in shapes if path not in paths]:
        raise UserError(f"table: no row covers {', '.join(uncovered)}")

    out = [entry for row in rows for entry in _expand(row, shapes)]
    if twice := [key for key, n in Counter(e.key for e in out).items() if n > 1]:
        raise UserError(f"table: several rows write the key {twice[0]}")
    return tuple(out)


def to_theirs(rows: Sequence[Row], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (key, tensor), one at a time so that no second copy of the model is held.

    Raises:
        UserError: as `entries`.
    """
    arrays = flatten(params)
    held: dict[str, np.ndarray] = {}  # a stacked parameter leaves the device once, not once a layer
    for entry in entries(rows, params):
        for piece in entry.pieces:
            if piece.path not in held:
                held[piece.path] = np.asarray(arrays[piece.path])
        parts = [piece.to_theirs(held[piece.path]) for piece in entry.pieces]
        yield entry.key, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=entry.split)


def to_ours(rows: Sequence[Row], tensors: Mapping[str, np.ndarray], abstract: Any) -> dict[str, Any]:
    """Tensors by key -> our parameters, in the dtype of `abstract`.

    A file may leave out the prefix that all layers share (`transformer.`), hold buffers that follow from the
    configuration, or repeat the embedding table as a tied output head: all three are understood.

    Raises:
        StorageError: a tensor is missing, has another shape or is not of floating point; or the file holds one that
            this decoder has no place for.
        UserError: as `entries`.
    """
    table = entries(rows, abstract)
    leaves = flatten(abstract)
    stored = _stored_keys(table, tensors)
    out = {path: np.empty(x.shape, x.dtype) for path, x in leaves.items()}
    for entry in table:
        theirs = tensors[stored[entry.key]]
        if tuple(theirs.shape) != entry.shape:
            raise StorageError(f"tensor {entry.key} has shape {list(theirs.shape)}; expected {list(entry.shape)}")
        if not _is_float(theirs.dtype):
            raise StorageError(f"tensor {entry.key} is {theirs.dtype}; expected float32, bfloat16 or float16")
        start = 0
        for piece in entry.pieces:
            width = piece.shape[entry.split] if len(entry.pieces) > 1 else None
            part = theirs if width is None else np.take(theirs, range(start, start + width), axis=entry.split)
            start += width or 0
            target = out[piece.path]
            target[... if piece.repeat is None else piece.repeat] = piece.to_ours(part)

    for key in sorted(set(tensors) - set(stored.values())):
        if not (BUFFERS.search(key) or _repeats_embedding(table, stored, tensors, key)):
            raise StorageError(f"tensor {key[:200]!r} has no place in this decoder")
    return unflatten(out)


def _paths(row: Row) -> tuple[str, ...]:
    return (row.ours,) if isinstance(row.ours, str) else row.ours


def _expand(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    """One row -> an entry a layer."""
    paths = _paths(row)
    if len(paths) > 1 and row.split is None:
        raise UserError(f"table: the row of {row.theirs} fuses {len(paths)} parameters but names no `split` axis")
    if "{}" not in row.theirs:
        yield _entry(row, shapes, row.theirs, None)
        return
    first = next(iter(paths))
    block = first.split("/")[1]
    numbered = block.isdigit()
    blocks = len({path.split("/")[1] for path in shapes if path.startswith("layers/")}) if numbered else 1
    index = int(block) if numbered else 0
    for repeat in range(shapes[first][0]):
        yield _entry(row, shapes, row.theirs.format(repeat * blocks + index), repeat)


def _entry(row: Row, shapes: Mapping[str, tuple[int, ...]], key: str, repeat: int | None) -> Entry:
    pieces = []
    for path in _paths(row):
        ours = shapes[path] if repeat is None else shapes[path][1:]
        sizes, theirs = _invert(row.pattern, ours, path)
        pieces.append(Piece(path=path, repeat=repeat, shape=theirs, pattern=row.pattern, sizes=sizes))
    return Entry(key=key, pieces=tuple(pieces), split=row.split or 0)


def _invert(pattern: str, shape: tuple[int, ...], path: str) -> tuple[dict[str, int], tuple[int, ...]]:
    """`(h k) d -> d h k` and our shape -> the size of each axis, and the shape of theirs."""
    left, right = pattern.split("->")
    names = right.split()
    if len(names) != len(shape) or not all(name.isidentifier() for name in names):
        raise UserError(f"table: pattern {pattern!r} does not fit {path} of shape {list(shape)}")
    sizes = dict(zip(names, shape, strict=True))
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]
    return sizes, tuple(math.prod(sizes[name] for name in group) for group in groups)


def _stored_keys(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Their key -> the key in the file, which may lack the prefix of the base model.

    Raises:
        StorageError: a key is missing.
    """
    prefix = next((e.key.split(".")[0] + "." for e in table if e.pieces[0].repeat is not None), "")
    bare = not any(key.startswith(prefix) for key in tensors)
    stored = {e.key: e.key.removeprefix(prefix) if bare else e.key for e in table}
    if missing := [entry for entry in table if stored[entry.key] not in tensors]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise StorageError(f"tensor {missing[0].key} of shape {list(missing[0].shape)} is missing{more}")
    return stored


def _repeats_embedding(
    table: Sequence[Entry], stored: Mapping[str, str], tensors: Mapping[str, np.ndarray], key: str
) -> bool:
    """Whether an unexpected key is the output head of a tied model, stored a second time."""
    embedding = next((e for e in table if e.pieces[0].path == "embed/table"), None)
    untied = any(e.pieces[0].path == "unembed/table" for e in table)
    if embedding is None or untied or key not in ("lm_head.weight", "embed_out.weight"):
        return False
    return np.array_equal(tensors[key], tensors[stored[embedding.key]])


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float32", "bfloat16", "float16")
