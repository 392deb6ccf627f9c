"""How the targets of a teacher are laid out on disk: columns of 16 or 32 bit integers, a fixed number for each token.

The values of a token are ordered so that neighbours are alike, and each is kept as its difference to the one before
(modulo 2^16 or 2^32, so nothing is lost), which the compression of the chunks then makes small.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from slmjax.errors import UserError


def id_dtype(tokens: int) -> Literal["uint16", "uint32"]:
    """The dtype of ids below `tokens`."""
    return "uint16" if tokens <= 1 << 16 else "uint32"


@dataclass(frozen=True, kw_only=True)
class Column(abc.ABC):
    """Some values of each token. A subclass is a frozen dataclass, which JSON can hold."""

    width: int
    """Values a token"""

    @property
    @abc.abstractmethod
    def stored(self) -> str:
        """The numpy dtype on disk"""

    @abc.abstractmethod
    def encode(self, values: Any) -> np.ndarray:
        """Values [n, width] -> what is stored, [n, width]."""

    @abc.abstractmethod
    def decode(self, raw: np.ndarray) -> Mapping[str, np.ndarray]:
        """What is stored, [n, width] -> arrays of a batch by name, each [n, ...]."""


@dataclass(frozen=True, kw_only=True)
class Ids(Column):
    """Token ids. Decoded: `ids`, int32 [n, width], and with `rest` one more, -1: every token that is not listed."""

    dtype: Literal["uint16", "uint32"]
    rest: bool = False

    @property
    def stored(self) -> str:
        return self.dtype

    def encode(self, values: Any) -> np.ndarray:
        return np.asarray(values).astype(self.dtype)

    def decode(self, raw: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"ids": np.pad(raw.astype(np.int32), ((0, 0), (0, int(self.rest))), constant_values=-1)}


@dataclass(frozen=True, kw_only=True)
class LogProbs(Column):
    """Log-probabilities in bfloat16. Decoded: `log_probs`, float32 [n, width]."""

    @property
    def stored(self) -> str:
        return "uint16"

    def encode(self, values: Any) -> np.ndarray:
        return _differences(np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))

    def decode(self, raw: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"log_probs": _sums(raw).view(ml_dtypes.bfloat16).astype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class Draws(Column):
    """Ids drawn at random, in ascending order; `width` draws.

    Decoded: `ids`, int32 [n, width], and `log_probs`, float32 [n, width]: the log of the share of the draws at the
    first of equal ids, -inf at the others.
    """

    dtype: Literal["uint16", "uint32"]

    @property
    def stored(self) -> str:
        return self.dtype

    def encode(self, values: Any) -> np.ndarray:
        return _differences(np.asarray(values).astype(self.dtype))

    def decode(self, raw: np.ndarray) -> Mapping[str, np.ndarray]:
        ids, at = _sums(raw).astype(np.int32), np.arange(self.width)
        first = np.ones(ids.shape, bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        begins = np.where(first, at, self.width)
        after = np.full(ids.shape, self.width)  # where the next id begins
        after[:, :-1] = np.minimum.accumulate(begins[:, :0:-1], axis=1)[:, ::-1]
        share = np.log((after - at) / self.width).astype(np.float32)
        return {"ids": ids, "log_probs": np.where(first, share, np.float32(-np.inf))}


@dataclass(frozen=True, kw_only=True)
class Halves(Column):
    """Vectors in half precision. Decoded: `hidden`, [n, width] of that dtype."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    @property
    def stored(self) -> str:
        return "uint16"

    @property
    def _type(self) -> Any:
        return ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float16

    def encode(self, values: Any) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if self.dtype == "float16" and values.size and np.abs(values).max() > 65504:
            raise UserError(
                f"a hidden state holds {np.abs(values).max():.3g}, which float16 cannot represent; use bfloat16"
            )
        return values.astype(self._type).view(np.uint16)

    def decode(self, raw: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"hidden": np.ascontiguousarray(raw).view(self._type)}


def _differences(x: np.ndarray) -> np.ndarray:
    return np.diff(x, axis=1, prepend=x.dtype.type(0))


def _sums(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x, axis=1, dtype=x.dtype)
