"""The tensors of a file under the names of a family: old names are replaced, copies and unused tensors left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from slmjax.convert.coded import Coded, Source
from slmjax.convert.safetensors_io import Tensors
from slmjax.convert.unpack_quantized import Unpacked
from slmjax.errors import StorageError
from slmjax.models.families.common.rows import Family


class Selection(Source):
    """Some of the tensors of a mapping, under other names."""

    def __init__(self, tensors: Tensors | Unpacked, names: Mapping[str, str]):
        """names: new -> old."""
        self._tensors, self._names = tensors, names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, without reading any tensor."""
        stored = self._tensors.shapes
        return {new: stored[old] for new, old in self._names.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors[self._names[key]]

    def coded(self, key: str) -> Coded | None:
        """As `Source`."""
        return self._tensors.coded(self._names[key]) if isinstance(self._tensors, Unpacked) else None

    def as_theirs(self, key: str, x: np.ndarray) -> np.ndarray:
        """As `Source`."""
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def select(tensors: Tensors | Unpacked, family: Family) -> Selection:
    """The tensors of a file that `family` reads, under the names of its table.

    Raises:
        StorageError: two tensors would get the same name, or tensors that have to be copies of each other differ.
    """
    names: dict[str, str] = {}
    for key in tensors:
        new = key
        for old, now in family.renamed.items():
            new = new.replace(old, now)
        if family.unread and re.fullmatch(family.unread, key):
            continue
        if new in names:
            raise StorageError(f"tensors {names[new]} and {key} are one and the same; expected one of them")
        names[new] = key
    for copy, of in family.repeats.items():
        if copy in names and of in names:
            if not np.array_equal(tensors[names[copy]], tensors[names[of]]):
                raise StorageError(f"tensor {names[copy]} differs from {names[of]}; a tied model uses one for both")
            del names[copy]
    return Selection(tensors, names)
