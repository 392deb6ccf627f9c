"""Tokenizers: bytes, a BPE trained here, or any tokenizer.json, all through the `tokenizers` library.

A folder with a tokenizer holds two files that stock `transformers` reads: tokenizer.json and tokenizer_config.json
(the names of the special tokens). A document becomes [BOS] text [EOS], each where the tokenizer has one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from slmjax.errors import DataError

BOS = "<|bos|>"
EOS = "<|eos|>"
FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """How the tokenizer of a store comes to be."""

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        """Train on `texts`, or load relative to `root`."""
        raise TypeError(f"{type(self).__name__} is not a tokenizer: use Bytes, BPE or File")


@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerSpec):
    """One token a byte: ids 0 to 255 are the bytes of UTF-8, 256 is BOS, 257 is EOS. Nothing is trained."""

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        letters = _letters_of_bytes()
        vocab = {letter: byte for byte, letter in enumerate(letters)}
        raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.add_special_tokens([BOS, EOS])
        return Tokenizer(_finish(raw), bos=BOS, eos=EOS)


@dataclass(frozen=True, kw_only=True)
class BPE(TokenizerSpec):
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2), trained on the cleaned documents."""

    vocab: int = 4096
    """Ids including the 256 bytes, BOS and EOS"""
    min_frequency: int = 2
    sample_bytes: int = 200_000_000
    """Train on about this much text, taken evenly from the whole corpus"""

    def __post_init__(self) -> None:
        if self.vocab < 258:
            raise DataError(f"BPE.vocab is {self.vocab}; it needs at least 258: 256 bytes, BOS and EOS")

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        raw = tokenizers.Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab,
            min_frequency=self.min_frequency,
            special_tokens=[BOS, EOS],
            initial_alphabet=_letters_of_bytes(),
            show_progress=False,
        )
        raw.train_from_iterator(texts, trainer)
        return Tokenizer(_finish(raw), bos=BOS, eos=EOS)


@dataclass(frozen=True, kw_only=True)
class File(TokenizerSpec):
    """A tokenizer.json, or a folder that holds one, relative to the recipe file.

    `bos` and `eos` default to what tokenizer_config.json beside it says; "" means that documents get none.
    """

    path: str
    bos: str | None = None
    eos: str | None = None

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        return Tokenizer.load(root / Path(self.path).expanduser(), bos=self.bos, eos=self.eos)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its BOS and EOS policy.

    Text never turns into special tokens: `<|eos|>` inside a document is encoded letter by letter.
    """

    def __init__(self, raw: tokenizers.Tokenizer, *, bos: str | None, eos: str | None):
        raw.encode_special_tokens = True
        self.raw = raw
        self.bos, self.eos = bos or None, eos or None
        self.bos_id, self.eos_id = (self._id_of(t) for t in (self.bos, self.eos))
        self.vocab: int = max(raw.get_vocab(with_added_tokens=True).values()) + 1
        """Rows that an embedding table needs"""

    @classmethod
    def load(cls, path: Path, *, bos: str | None = None, eos: str | None = None) -> Tokenizer:
        """From a tokenizer.json or the folder that holds it.

        Raises:
            DataError: missing, not a tokenizer, or BOS or EOS not in its vocabulary.
        """
        file = path / FILES[0] if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file}: no such tokenizer")
        try:
            raw = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise DataError(f"{file}: not a tokenizer.json: {error}") from error
        named = _special_tokens(file.with_name(FILES[1]))
        try:
            return cls(
                raw, bos=named["bos_token"] if bos is None else bos, eos=named["eos_token"] if eos is None else eos
            )
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as `transformers.PreTrainedTokenizerFast` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(self.raw.to_str(pretty=True), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        (folder / FILES[1]).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer JSON with the BOS and EOS ids: equal means equal token ids."""
        canonical = json.dumps(json.loads(self.raw.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{canonical}|{self.bos_id}|{self.eos_id}".encode()).hexdigest()

    @property
    def dtype(self) -> Any:
        """The narrowest unsigned type that holds every id."""
        return np.uint16 if self.vocab <= 1 << 16 else np.uint32

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of one text, with BOS and EOS where asked for and defined."""
        ids = self.raw.encode(text, add_special_tokens=False).ids
        return self._before * bos + ids + self._after * eos

    def documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Whole documents as [BOS] text [EOS]: all ids, one after another, and int64 lengths in tokens."""
        flat: list[int] = []
        ends = [0]
        for encoding in self.raw.encode_batch_fast(texts, add_special_tokens=False):
            flat += self._before
            flat += encoding.ids
            flat += self._after
            ends.append(len(flat))
        return np.array(flat, self.dtype), np.diff(np.array(ends, np.int64))

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """Text of the ids; `special` keeps special tokens visible."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=not special)

    @property
    def _before(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def _after(self) -> list[int]:
        return [] if self.eos_id is None else [self.eos_id]

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        found = self.raw.token_to_id(token)
        if found is None:
            raise DataError(f"special token {token!r} is not in the vocabulary")
        return found


def _finish(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Decoding, and BOS before a prompt as `transformers` encodes it."""
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    return raw


def _letters_of_bytes() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte, by byte value (the table of GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]


def _special_tokens(file: Path) -> dict[str, str | None]:
    """The names of BOS and EOS in a tokenizer_config.json, which writes a token as text or as an object with `content`.

    Raises:
        DataError: it is something else than that. A file that is not there names none.
    """
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: expected a JSON object, found a {type(config).__name__}")
    named = {}
    for field in ("bos_token", "eos_token"):
        token = config.get(field)
        name = token.get("content") if isinstance(token, dict) else token
        if not (name is None or isinstance(name, str)) or (isinstance(token, dict) and name is None):
            raise DataError(f"{file}: {field} is {token!r}; expected a string, an object with `content`, or null")
        named[field] = name
    return named
