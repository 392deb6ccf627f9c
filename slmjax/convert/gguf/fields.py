"""What config.json of `transformers` and the keys of a GGUF file say in different words: one value for each field, for
both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmjax.convert.gguf.file import GGUF, shown
from slmjax.errors import StorageError, UserError

Config = Mapping[str, Any]
"""config.json as `transformers` writes it"""

HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")
"""Keys of an architecture that do not change what is computed"""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""The tables of tokens at a model's input and output"""


class Keys:
    """The keys of a GGUF file that describe its architecture, without the architecture's name. Each is taken once."""

    def __init__(self, file: GGUF, architecture: str):
        self.file, self.prefix = file, f"{architecture}."
        self._left = {k.removeprefix(self.prefix): v for k, v in file.metadata.items() if k.startswith(self.prefix)}

    def take(self, key: str, default: Any = None) -> Any:
        """A value of any type."""
        return self._left.pop(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            StorageError: it is none, or missing without a default.
        """
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self.wrong(key, value, "a positive number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number: the shortest decimal that is this float32, so 1e-5 and not 9.99999974e-06.

        Raises:
            StorageError: it is none, or missing without a default.
        """
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.wrong(key, value, "a positive number")
        return shortest(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """
        Raises:
            StorageError: it is neither true nor false, or missing without a default.
        """
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> StorageError:
        """The error for a value that cannot be."""
        return StorageError(f"{self.file.file}: {self.prefix}{key} = {shown(value)}; expected {expected}")

    def close(self) -> None:
        """
        Raises:
            UserError: a key was not taken, and may change what the model computes.
        """
        if self.take("attention.causal", True) is not True:
            raise UserError(f"{self.prefix}attention.causal = False: a model that reads both ways is not supported")
        for key, value in self._left.items():
            if key not in HARMLESS and np.any(value):
                raise UserError(
                    f"{self.prefix}{key} = {shown(value)} is not supported and may change what the model computes"
                )


@dataclass(frozen=True, kw_only=True)
class Field:
    """Some fields of config.json, and the keys and tensors of a GGUF file that say the same."""

    write: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    """config.json -> keys, without the architecture's name. Raises UserError if llama.cpp computes otherwise"""
    read: Callable[[Keys, Config], Mapping[str, Any]] = lambda keys, config: {}
    """Keys, and config.json as far as earlier fields have read it -> fields of config.json"""
    tensors: Callable[[Config], Mapping[str, np.ndarray]] = lambda config: {}
    """config.json -> tensors that hold no parameters"""


def shortest(x: float) -> float:
    """The number with the fewest decimals that is the same float32."""
    return float(str(np.float32(x)))


def count(key: str, name: str) -> Field:
    """A positive integer: `key` in a GGUF file, `name` in config.json."""
    return Field(write=lambda c: {key: c[name]}, read=lambda keys, c: {name: keys.count(key)})


def real(key: str, name: str, default: float | None = None) -> Field:
    """A positive number."""
    return Field(write=lambda c: {key: float(c[name])}, read=lambda keys, c: {name: keys.real(key, default)})


def flag(key: str, name: str) -> Field:
    """True or false."""
    return Field(write=lambda c: {key: c[name]}, read=lambda keys, c: {name: keys.flag(key)})


def only(name: str, *values: Any) -> Field:
    """A field of config.json not in files: llama.cpp computes the same for all `values`, the first is read."""

    def write(config: Config) -> dict[str, Any]:
        expect(config, name, *values)
        return {}

    return Field(write=write, read=lambda keys, c: {name: values[0]})


def expect(config: Config, key: str, *values: Any) -> None:
    """Checks a field that llama.cpp does not read.

    Raises:
        UserError: it has a value other than those that llama.cpp assumes.
    """
    if key in config and config[key] not in values:
        raise UserError(f"{key} = {config[key]!r}: llama.cpp computes this architecture only with {values[0]!r}")


def if_there(name: str, tensor: str) -> Field:
    """A field of config.json that is true where a file has a tensor."""
    return Field(read=lambda keys, c: {name: tensor in keys.file})


def repeats_embedding(file: GGUF) -> bool:
    """Whether a file has the table of the input a second time, as the output's: old converters wrote it."""
    return {EMBEDDING, HEAD} <= set(file) and file.same(EMBEDDING, HEAD)


TIED = Field(read=lambda keys, c: {"tie_word_embeddings": HEAD not in keys.file or repeats_embedding(keys.file)})


def _vocab(keys: Keys, config: Config) -> dict[str, Any]:
    keys.take("vocab_size")  # the rows of the table count
    if EMBEDDING not in keys.file:
        raise StorageError(f"{keys.file.file}: tensor {EMBEDDING!r} is missing")
    return {"vocab_size": keys.file.infos[EMBEDDING].shape[0]}


CONTEXT = count("context_length", "max_position_embeddings")


def sizes(
    *, layers: str = "num_hidden_layers", width: str = "hidden_size", context: Field = CONTEXT
) -> tuple[Field, ...]:
    """Vocabulary, context, width and number of layers. `layers`, `width`: their names in config.json."""

    def depth(keys: Keys, config: Config) -> dict[str, Any]:
        found = keys.count("block_count")
        if found > len(keys.file):
            many = f"{keys.prefix}block_count = {found}, but there are only {len(keys.file)} tensors"
            raise StorageError(f"{keys.file.file}: {many}")
        return {layers: found}

    return (
        Field(write=lambda c: {"vocab_size": c["vocab_size"]}, read=_vocab),
        context,
        count("embedding_length", width),
        Field(write=lambda c: {"block_count": c[layers]}, read=depth),
    )


HIDDEN = count("feed_forward_length", "intermediate_size")


def head_dim(config: Config) -> int:
    """Width of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _written_heads(heads: int, kv: int, size: int) -> dict[str, int]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.key_length": size,
        "attention.value_length": size,
    }


def _read_heads(keys: Keys, width: int) -> tuple[int, int, int]:
    """Heads, key-value heads, width of a head."""
    heads = keys.count("attention.head_count")
    size = keys.count("attention.key_length", max(1, width // heads))
    if keys.count("attention.value_length", size) != size:
        raise UserError(f"{keys.prefix}attention.value_length is not attention.key_length, {size}: not supported")
    kv = keys.count("attention.head_count_kv", heads)
    if size % 2 or heads % kv:
        raise StorageError(
            f"{keys.file.file}: {heads} heads of width {size} with {kv} key-value heads are not possible"
        )
    return heads, kv, size


def _grouped(keys: Keys, config: Config) -> dict[str, Any]:
    heads, kv, size = _read_heads(keys, config["hidden_size"])
    return {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": size}


GROUPED = Field(write=lambda c: _written_heads(c["num_attention_heads"], kv_heads(c), head_dim(c)), read=_grouped)
"""Heads of a free width, several of which may share keys and values"""


def multi_head(name: str = "num_attention_heads", width: str = "hidden_size") -> Field:
    """Heads that divide the width, each with keys and values of its own; the arguments are names in config.json."""

    def read(keys: Keys, config: Config) -> dict[str, Any]:
        heads, kv, size = _read_heads(keys, config[width])
        if kv != heads or size * heads != config[width]:
            raise UserError(
                f"{heads} heads of width {size} with {kv} key-value heads, at a width of {config[width]}: this "
                "architecture is only supported with heads that divide the width and share no keys"
            )
        return {name: heads}

    return Field(write=lambda c: _written_heads(c[name], c[name], c[width] // c[name]), read=read)


def no_window(config: Config) -> dict[str, Any]:
    """`Field.write` of architectures in which llama.cpp has no windows.

    Raises:
        UserError: the attention window is shorter than the context.
    """
    used = config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    if used and window is not None and window < config["max_position_embeddings"]:
        raise UserError(
            f"sliding_window = {window}: llama.cpp ignores it in this architecture; export a model whose context "
            f"is at most the window (max_position_embeddings is {config['max_position_embeddings']})"
        )
    return {}


NO_WINDOW = Field(write=no_window)
WINDOW = "attention.sliding_window"


def length_of(keys: Keys, window: Any) -> int:
    """A window in tokens, if it is one. Raises StorageError if it is none."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise keys.wrong(WINDOW, window, "a number of tokens")
    return window


RMS = real("attention.layer_norm_rms_epsilon", "rms_norm_eps")
SIZES = (*sizes(), HIDDEN, GROUPED)
"""What decoders with the usual names in config.json have in common"""
