"""Reads the rows of a family's table in both directions: slmjax parameters <-> tensors of another format by their key.

"ours" is a parameter of slmjax, which stacks the layers on the leading axis; "theirs" is a tensor of the other format,
which has one for each layer, numbered as `Row.numbers` says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from einops import rearrange

from slmjax.errors import StorageError, UserError
from slmjax.models.families.common.rows import Row
from slmjax.tree import flatten, unflatten

# Masks and tables that old files store beside the parameters; the configuration determines them.
BUFFERS = re.compile(r"(^|\.)((rotary_emb|pos_embed)\.inv_freq|attn\.(masked_)?bias)$")
HEADS = ("lm_head.weight", "embed_out.weight", "model.output.weight")
"""Names of the output table"""
TIED = "tie_word_embeddings"
"""Field of config.json: whether the output table is the embedding table"""


Where: TypeAlias = tuple[int | slice, ...]
"""Index of a part of a parameter of ours: its layer, and its index on the axis `Row.each`"""


class Entry(NamedTuple):
    """One tensor of the other format, and the parts of our parameters in it: one, or several, concatenated or
    interleaved."""

    key: str
    parts: tuple[tuple[str, Where], ...]
    """(path of our parameter, index of the part)"""
    pattern: str
    """einops, theirs -> ours"""
    sizes: tuple[dict[str, int], ...]
    """Size of each axis named in `pattern`, for each part"""
    shapes: tuple[tuple[int, ...], ...]
    """Shape that their tensor would have if it held each part alone"""
    split: int | None
    """Axis of their tensor along which the parts are concatenated; None: one part, or several on an axis `n`"""
    alias: str | None = None
    """Another key under which a file may hold the tensor"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of their tensor."""
        first = self.shapes[0]
        if self.split is None:
            return first
        fused = sum(shape[self.split] for shape in self.shapes)
        return (*first[: self.split], fused, *first[self.split + 1 :])

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Parts of our parameters -> their tensor."""
        left, right = self.pattern.split("->")
        if self.split is None:
            whole = ours[0] if len(ours) == 1 else np.stack(ours)
            return rearrange(whole, f"{right}->{left}", **self.sizes[0])
        each = [rearrange(x, f"{right}->{left}", **sizes) for x, sizes in zip(ours, self.sizes, strict=True)]
        return np.concatenate(each, axis=self.split)

    def to_ours(self, theirs: np.ndarray) -> Sequence[np.ndarray]:
        """Their tensor -> parts of our parameters."""
        if self.split is None:
            whole = rearrange(theirs, self.pattern, **self.sizes[0])
            return [whole] if len(self.parts) == 1 else list(whole)
        ends = np.cumsum([shape[self.split] for shape in self.shapes])[:-1]
        each = np.split(theirs, ends, axis=self.split)
        return [rearrange(x, self.pattern, **sizes) for x, sizes in zip(each, self.sizes, strict=True)]


def entries(rows: Sequence[Row], abstract: Any) -> tuple[Entry, ...]:
    """Rows of a family -> one entry for each tensor of the other format.

    Args:
        abstract: the decoder's parameters, or a tree of the same structure whose leaves have a shape.

    Raises:
        UserError: a parameter is covered by no row or by several, a row names a parameter that does not exist, or a
            pattern does not fit the shape.
    """
    shapes = {path: tuple(x.shape) for path, x in flatten(abstract).items()}
    paths = [path for row in rows for path in _paths(row)]
    for path, n in Counter(paths).items():
        if path not in shapes:
            raise UserError(f"table: {path} is not a parameter of this decoder, which has: {', '.join(shapes)}")
        if n > 1:
            raise UserError(f"table: {path} is covered by {n} rows; expected one")
    if uncovered := [path for path in shapes if path not in paths]:
        raise UserError(f"table: no row covers {', '.join(uncovered)}")

    out = [entry for row in rows for entry in _expand(row, shapes)]
    if twice := [key for key, n in Counter(e.key for e in out).items() if n > 1]:
        raise UserError(f"table: several rows write the key {twice[0]}")
    return tuple(out)


def to_theirs(rows: Sequence[Row], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (their key, tensor), one at a time, so that memory never holds a second copy of the model.

    Raises:
        UserError: as `entries`.
    """
    arrays = flatten(params)
    held: dict[str, np.ndarray] = {}  # a stacked parameter is copied from the device once, not once a layer
    for entry in entries(rows, params):
        for path, _ in entry.parts:
            if path not in held:
                held[path] = np.asarray(arrays[path])
        yield entry.key, entry.to_theirs([held[path][where] for path, where in entry.parts])


def to_ours(
    rows: Sequence[Row],
    tensors: Mapping[str, np.ndarray],
    abstract: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Tensors by key -> our parameters, in the dtype of `abstract`. Each tensor is read once and not kept.

    A file may lack the prefix that all layers share (`transformer.`), hold buffers that the configuration determines,
    or repeat the embedding table as a tied output head: all three are accepted.

    Args:
        shapes: of the tensors, if known without reading them: then nothing is allocated for a file that does not fit.

    Raises:
        StorageError: a tensor is missing, has another shape or is not floating point; or the file has a tensor that
            this decoder does not use.
        UserError: as `entries`.
    """
    fitting = placed(rows, tensors, abstract, shapes)  # before any memory is taken
    out = {path: np.empty(x.shape, x.dtype) for path, x in flatten(abstract).items()}
    for entry, key in fitting:
        for (path, where), part in zip(entry.parts, entry.to_ours(floats(entry, tensors[key])), strict=True):
            out[path][where] = part
    return unflatten(out)


def placed(
    rows: Sequence[Row],
    tensors: Mapping[str, np.ndarray],
    abstract: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[tuple[Entry, str]]:
    """Each tensor that the decoder needs, and its key in this file. Raises as `to_ours`."""
    table = entries(rows, abstract)
    stored = _stored_keys(table, tensors)
    shapes = {key: x.shape for key, x in tensors.items()} if shapes is None else shapes
    for entry in table:
        if (shape := tuple(shapes[stored[entry.key]])) != entry.shape:
            raise StorageError(f"tensor {entry.key} has shape {list(shape)}; expected {list(entry.shape)}")
    for key in sorted(set(tensors) - set(stored.values())):
        if not (BUFFERS.search(key) or _repeats_embedding(table, stored, tensors, key)):
            raise StorageError(f"tensor {key[:200]!r} has no place in this decoder")
    return [(entry, stored[entry.key]) for entry in table]


def floats(entry: Entry, theirs: np.ndarray) -> np.ndarray:
    """The tensor of an entry.

    Raises:
        StorageError: it is not floating point.
    """
    if theirs.dtype.name not in ("float32", "bfloat16", "float16"):
        raise StorageError(f"tensor {entry.key} is {theirs.dtype}; expected float32, bfloat16 or float16")
    return theirs


def _paths(row: Row) -> tuple[str, ...]:
    return (row.ours,) if isinstance(row.ours, str) else row.ours


def _expand(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    """One row -> one entry for each layer, and within a layer one for each index of the axis `each`."""
    paths = _paths(row)
    interleaved = row.pattern.split("->")[1].split()[:1] == ["n"]
    if len(paths) > 1 and row.split is None and not interleaved:
        raise UserError(f"table: the row of {row.theirs} fuses {len(paths)} parameters but names no `split` axis")
    first, layered = next(iter(paths)), "{}" in row.theirs
    theirs, pattern, axis = row.theirs, row.pattern, 0
    indices: Sequence[int | None] = (None,)
    if row.each is not None:
        left, right = row.pattern.split("->")
        names = right.split()
        axis = names.index(row.each)
        pattern = f"{left}-> {' '.join(name for name in names if name != row.each)}"
        indices = range(shapes[first][axis + layered])
    repeats: Sequence[int | None] = range(shapes[first][0]) if layered else (None,)
    for repeat in repeats:
        number = repeat if row.numbers is None or repeat is None else row.numbers[repeat]
        for index in indices:
            key = theirs.replace("{}", str(number)).replace("{each}", str(index))
            where: Where = () if repeat is None else (repeat,)
            where = where if index is None else (*where, *(slice(None),) * axis, index)
            inner = [_inner(shapes[path], where) for path in paths]
            inverted = [_invert(pattern, shape, path, len(paths)) for shape, path in zip(inner, paths, strict=True)]
            yield Entry(
                key=key,
                parts=tuple((path, where) for path in paths),
                pattern=pattern,
                sizes=tuple(sizes for sizes, _ in inverted),
                shapes=tuple(shape for _, shape in inverted),
                split=row.split if len(paths) > 1 else None,
                alias=row.alias,
            )


def _inner(shape: tuple[int, ...], where: Where) -> tuple[int, ...]:
    """The shape of `x[where]` for an x of this shape."""
    kept = [n for n, at in zip(shape, where, strict=False) if isinstance(at, slice)]
    return (*kept, *shape[len(where) :])


def _invert(pattern: str, shape: tuple[int, ...], path: str, count: int) -> tuple[dict[str, int], tuple[int, ...]]:
    """`(h k) d -> d h k` and the shape of our parameter -> the size of each axis, and the shape of their tensor."""
    left, right = pattern.split("->")
    names = right.split()
    shape = (count, *shape) if names[:1] == ["n"] else shape
    if len(names) != len(shape) or not all(name.isidentifier() for name in names):
        raise UserError(f"table: pattern {pattern!r} does not fit {path} of shape {list(shape)}")
    sizes = dict(zip(names, shape, strict=True))
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]
    return sizes, tuple(math.prod(1 if name == "1" else sizes[name] for name in group) for group in groups)


def _stored_keys(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Their key -> the key in this file, which may lack the prefix of the base model.

    Raises:
        StorageError: a key is missing.
    """
    prefix = next((e.key.split(".")[0] + "." for e in table if "layers" in e.parts[0][0].split("/")[0]), "")
    bare = not any(key.startswith(prefix) for key in tensors)
    stored = {e.key: e.key.removeprefix(prefix) if bare else e.key for e in table}
    aliases = {e.key: e.alias for e in table if e.alias is not None and stored[e.key] not in tensors}
    stored |= {key: alias for key, alias in aliases.items() if alias in tensors}
    if missing := [entry for entry in table if stored[entry.key] not in tensors]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        head = [entry.key for entry in missing] == [missing[0].key] and missing[0].parts[0][0] == "unembed/table"
        hint = f"; if the model is tied (its output head is the embedding table), set {TIED} to true" if head else ""
        raise StorageError(f"tensor {missing[0].key} of shape {list(missing[0].shape)} is missing{more}{hint}")
    return stored


def _repeats_embedding(
    table: Sequence[Entry], stored: Mapping[str, str], tensors: Mapping[str, np.ndarray], key: str
) -> bool:
    """Whether an unexpected key is the output head of a tied model, stored a second time.

    Raises:
        StorageError: it is the output head, and not that of a tied model.
    """
    embedding = next((e for e in table if e.parts[0][0] == "embed/table"), None)
    untied = any(e.parts[0][0] == "unembed/table" for e in table)
    if embedding is None or untied or key not in HEADS:
        return False
    if not np.array_equal(tensors[key], tensors[stored[embedding.key]]):
        raise StorageError(
            f"tensor {key} differs from {stored[embedding.key]}, but the model is tied: its output head is the "
            f"embedding table. If the head is one of its own, set {TIED} to false in config.json"
        )
    return True
