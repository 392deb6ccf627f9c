"""How each class of `transformers` is written as GGUF and read from it: one value for each architecture of llama.cpp.

The names of the tensors come from the `gguf` package. Here is what remains: tensors with another layout, and the fields
(`fields.py`), which hold hyperparameters and what llama.cpp assumes of an architecture.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from slmjax.convert.gguf.fields import Config, Field, Keys, kv_heads
from slmjax.convert.gguf.file import GGUF
from slmjax.errors import UserError


class Transform(NamedTuple):
    """A change of layout, for tensors whose `transformers` key matches."""

    keys: str
    """Regular expression, searched"""
    apply: Callable[[np.ndarray, Config], np.ndarray]
    """Tensor of transformers -> tensor of GGUF, with axes in numpy's order"""
    undo: Callable[[np.ndarray, Config], np.ndarray]
    """Tensor of GGUF -> tensor of transformers"""


@dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """A class of `transformers` and an architecture of llama.cpp that compute the same, for both directions."""

    model_type: str
    arch: MODEL_ARCH
    fields: tuple[Field, ...]
    """What there is to know besides the tensors, in the order in which it is read: some need others to be known"""
    told_by: str | None = None
    """The key, without the architecture's name, that files of others of the same architecture do not have"""
    transforms: tuple[Transform, ...] = ()
    stacked: str = r"(?!)"
    """Regular expression of keys whose last number is a head: transformers has a tensor a head, GGUF one for all"""
    drift: float = 0.0
    """How far log-probabilities may be off because llama.cpp approximates an activation, in nats times
    max(1, max|logit|)"""

    @property
    def name(self) -> str:
        """Name of the architecture in llama.cpp."""
        return MODEL_ARCH_NAMES[self.arch]

    def keys(self, config: Config) -> dict[str, Any]:
        """The hyperparameters of a model, as keys of a GGUF file.

        Raises:
            UserError: llama.cpp computes this model otherwise.
        """
        return {f"{self.name}.{key}": value for field in self.fields for key, value in field.write(config).items()}

    def config(self, file: GGUF) -> dict[str, Any]:
        """The config.json of transformers that a file describes.

        Raises:
            UserError: a key that could change what the model computes is not supported.
            StorageError: a key is missing, or has a value that cannot be.
        """
        keys, config = Keys(file, self.name), {"model_type": self.model_type}
        for field in self.fields:
            config |= field.read(keys, config)
        keys.close()
        return config

    def rename(self, key: str, layers: int) -> str:
        """Key of transformers -> name in GGUF.

        Raises:
            UserError: llama.cpp has no such tensor.
        """
        names = _names(self.arch, layers)
        for candidate in (key, key.removeprefix("transformer.")):
            if found := names.get_name(candidate, (".weight", ".bias")):
                return found
        raise UserError(f"{key}: llama.cpp's {self.name} has no place for this tensor")

    def tensors(self, config: Config, theirs: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors of `transformers` -> tensors of GGUF, one at a time."""
        waiting: dict[str, dict[int, np.ndarray]] = {}
        layers = layers_of(config)
        for key, x in theirs:
            if re.search(self.stacked, key):
                whole, head = self._whole(key)
                waiting.setdefault(whole, {})[head] = x
                continue
            yield self.rename(key, layers), self._transform(key, x, config)
        for key, heads in waiting.items():
            yield self.rename(key, layers), np.stack([heads[i] for i in range(len(heads))])
        for field in self.fields:
            yield from field.tensors(config).items()

    def theirs(self, config: Config, key: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor of transformers with this key. `read`: name of a tensor in GGUF -> its values."""
        if re.search(self.stacked, key):
            whole, head = self._whole(key)
            return read(self.rename(whole, layers_of(config)))[head]
        x = read(self.rename(key, layers_of(config)))
        for transform in reversed(self.transforms):
            if re.search(transform.keys, key):
                x = transform.undo(x, config)
        return x

    def _whole(self, key: str) -> tuple[str, int]:
        """The key of one head's tensor -> that of all heads together, and which head it is."""
        at, end = [found.span() for found in re.finditer(r"\.\d+(?=\.)", key)][-1]
        return key[:at].removesuffix(".norms") + key[end:], int(key[at + 1 : end])

    def _transform(self, key: str, x: np.ndarray, config: Config) -> np.ndarray:
        for transform in self.transforms:
            if re.search(transform.keys, key):
                x = transform.apply(x, config)
        return x


@functools.lru_cache(maxsize=4)
def _names(arch: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(arch, layers)


def layers_of(config: Config) -> int:
    """Number of layers."""
    return config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"]


def pairs(keys: str, heads: Callable[[Config], int]) -> Transform:
    """Reorders rows [H * K, ...] of a projection so that channels i and i + K/2 of a head, which are rotated together,
    are adjacent, as llama.cpp expects for these architectures."""

    def swap(x: np.ndarray, h: int, *split: int) -> np.ndarray:
        return x.reshape(h, *split, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Transform(
        keys,
        lambda x, config: swap(x, heads(config), 2, len(x) // heads(config) // 2),
        lambda x, config: swap(x, heads(config), len(x) // heads(config) // 2, 2),
    )


def heads_last(keys: str, heads: Callable[[Config], int]) -> Transform:
    """Reorders rows (H, [q, k, v], K) to ([q, k, v], H, K)."""

    def swap(x: np.ndarray, first: int, second: int) -> np.ndarray:
        split = x.reshape(first, second, len(x) // first // second, *x.shape[1:])
        return split.swapaxes(0, 1).reshape(x.shape)

    return Transform(keys, lambda x, c: swap(x, heads(c), 3), lambda x, c: swap(x, 3, heads(c)))


TRANSPOSED = Transform(r"\.(c_attn|c_proj|c_fc)\.weight$", lambda x, c: x.T, lambda x, c: x.T)
"""Conv1D stores weights as [in, out]"""
OFFSET = Transform(r"norm\.weight$", lambda x, c: x + np.float32(1), lambda x, c: x - np.float32(1))
"""Gemma's norms multiply by 1 + w, llama.cpp by w"""
ROTATED = (
    pairs(r"\.q_proj\.(weight|bias)$", lambda c: c["num_attention_heads"]),
    pairs(r"\.k_proj\.(weight|bias)$", kv_heads),
)
