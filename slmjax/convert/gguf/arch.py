"""How each class of `transformers` is written as GGUF: one value for each architecture of llama.cpp.

The names of the tensors come from the `gguf` package. Here is what remains: hyperparameters, tensors with another
layout, and what llama.cpp assumes of an architecture, which is refused where a model differs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from slmjax.errors import UserError

Config = Mapping[str, Any]
"""config.json as `transformers` writes it"""


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
    """How a class of `transformers` is written as an architecture of llama.cpp."""

    model_type: str
    arch: MODEL_ARCH
    metadata: Callable[[Config], dict[str, Any]]
    """Hyperparameters, without the prefix of the architecture. Raises UserError if llama.cpp computes otherwise"""
    transforms: tuple[Transform, ...] = ()
    stacked: str = r"(?!)"
    """Regular expression of keys whose last number is a head: transformers has a tensor a head, GGUF one for all"""
    extra: Callable[[Config], dict[str, np.ndarray]] = lambda config: {}
    """Tensors that are computed from the configuration"""
    drift: float = 0.0
    """How far log-probabilities may be off because llama.cpp approximates an activation, in nats times
    max(1, max|logit|)"""

    @property
    def name(self) -> str:
        """Name of the architecture in llama.cpp."""
        return MODEL_ARCH_NAMES[self.arch]

    def keys(self, config: Config) -> dict[str, Any]:
        """`metadata` with the prefix of the architecture."""
        return {f"{self.name}.{key}": value for key, value in self.metadata(config).items()}

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
        yield from self.extra(config).items()

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


def expect(config: Config, key: str, *values: Any) -> None:
    """Checks a field that llama.cpp does not read.

    Raises:
        UserError: it has a value other than those that llama.cpp assumes.
    """
    if key in config and config[key] not in values:
        raise UserError(f"{key} = {config[key]!r}: llama.cpp computes this architecture only with {values[0]!r}")


def no_window(config: Config) -> None:
    """Raises UserError if the attention window is shorter than the context."""
    used = config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    if used and window is not None and window < config["max_position_embeddings"]:
        raise UserError(
            f"sliding_window = {window}: llama.cpp ignores it in this architecture; export a model whose context "
            f"is at most the window (max_position_embeddings is {config['max_position_embeddings']})"
        )


def head_dim(config: Config) -> int:
    """Width of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def sizes(config: Config) -> dict[str, Any]:
    """The hyperparameters that decoders with the usual field names have in common."""
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
    }


def rope_of(config: Config) -> Config:
    """The rotary parameters as transformers 5 writes them."""
    return config["rope_parameters"]


def rotated(config: Config) -> int:
    """Number of channels of a head that are rotated."""
    rope = rope_of(config)
    return int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))


def rotary(config: Config, *kinds: str) -> dict[str, Any]:
    """Hyperparameters of rotary positions. `kinds`: scalings allowed besides "default" and "linear".

    Raises:
        UserError: the frequencies are scaled in another way.
    """
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", *kinds):
        raise UserError(f"rope_type = {kind!r} cannot be written as GGUF for this architecture")
    keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotated(config)}
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys |= _yarn(rope)
    return keys


def _yarn(rope: Config) -> dict[str, Any]:
    """llama.cpp multiplies sines and cosines by 0.1 ln(factor) + 1, and by its own key beside that."""
    expect(rope, "truncate", True)
    expect(rope, "mscale", None)
    expect(rope, "mscale_all_dim", None)
    factor = float(rope["factor"])
    growth = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        "rope.scaling.attn_factor": rope.get("attention_factor", growth) / growth,
    }


def llama3_factors(config: Config) -> dict[str, np.ndarray]:
    """The tensor `rope_freqs.weight` of the llama3 scaling: llama.cpp divides the frequencies by it."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return {}
    size = rotated(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)}


def long_factors(config: Config) -> dict[str, np.ndarray]:
    """The longrope factors of Phi-3: `long` for contexts beyond the original one, `short` for others."""
    rope = rope_of(config)
    if rope["rope_type"] != "longrope":
        return {}
    return {f"rope_factors_{name}.weight": np.asarray(rope[f"{name}_factor"], np.float32) for name in ("long", "short")}


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
