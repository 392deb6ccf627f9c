"""Tokenizers: bytes, a BPE trained here, or any tokenizer.json, all through the `tokenizers` library.

A folder with a tokenizer holds two files that stock `transformers` reads: tokenizer.json and tokenizer_config.json
(the names of the special tokens, and the chat template if there is one). A document becomes [BOS] text [EOS], each
where the tokenizer has one.
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

from slmjax.data import tokenizer_config
from slmjax.data.chat import ChatTemplate
from slmjax.data.generation_config import end_tokens
from slmjax.errors import DataError
from slmjax.files import at
from slmjax.types import Special

BOS = "<|bos|>"
EOS = "<|eos|>"
MASK = "<|mask|>"
FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """How the tokenizer of a store is made."""

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        """Train on `texts`, or load relative to `root`."""
        raise TypeError(f"{type(self).__name__} is not a tokenizer: use Bytes, BPE or File")

    def files(self, root: Path) -> list[Path]:
        """The local files that it is read from; a build with other files is another build."""
        return []


@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerSpec):
    """One token for each byte: ids 0 to 255 are the bytes of UTF-8, 256 is BOS, 257 is EOS. Nothing is trained."""

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        letters = letters_of_bytes()
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
            special_tokens=self._special(),
            initial_alphabet=letters_of_bytes(),
            show_progress=False,
        )
        raw.train_from_iterator(texts, trainer)
        return self._wrapped(_finish(raw))

    def _special(self) -> list[str]:
        return [BOS, EOS]

    def _wrapped(self, raw: tokenizers.Tokenizer) -> Tokenizer:
        return Tokenizer(raw, bos=BOS, eos=EOS)


@dataclass(frozen=True, kw_only=True)
class MaskedBPE(BPE):
    """`BPE` with a third special token, the mask, for masked language models: ids 0, 1 and 2 are BOS, EOS and mask."""

    def _special(self) -> list[str]:
        return [BOS, EOS, MASK]

    def _wrapped(self, raw: tokenizers.Tokenizer) -> Tokenizer:
        return Tokenizer(raw, bos=BOS, eos=EOS, mask=MASK)


@dataclass(frozen=True, kw_only=True)
class File(TokenizerSpec):
    """A tokenizer.json, or a folder that holds one, relative to the recipe file.

    `bos` and `eos` default to what tokenizer_config.json beside it says (BERT's call them cls_token and sep_token); ""
    means that documents get none.
    """

    path: str
    bos: str | None = None
    eos: str | None = None

    def make(self, texts: Iterable[str], root: Path) -> Tokenizer:
        return Tokenizer.load(self._file(root), bos=self.bos, eos=self.eos)

    def files(self, root: Path) -> list[Path]:
        """
        Raises:
            DataError: there is none.
        """
        file = self._file(root)
        return [file, *(f for f in (file.with_name(FILES[1]), file.with_name(TEMPLATE)) if f.is_file())]

    def _file(self, root: Path) -> Path:
        path = root / at(self.path)
        file = path / FILES[0] if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file}: no such tokenizer")
        return file


class Tokenizer:
    """A `tokenizers.Tokenizer` with its BOS and EOS policy.

    Text never turns into special tokens: `<|eos|>` inside a document is encoded letter by letter.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        mask: str | None = None,
        chat: ChatTemplate | None = None,
    ):
        """
        Args:
            bos, eos: the tokens before and after a document; None or "" for none.
            mask: the token that replaces masked tokens, if there is one.
            chat: for conversations, if there is a template.
        """
        raw.encode_special_tokens = True
        raw.no_padding()  # files of sentence encoders turn padding on; documents are not padded here
        raw.no_truncation()
        self.raw, self.chat = raw, chat
        self.bos, self.eos = bos or None, eos or None
        self.mask = mask or None
        if not raw.get_vocab_size(with_added_tokens=True):
            raise DataError("the tokenizer has no tokens")
        self.bos_id, self.eos_id, self.mask_id = (self._id_of(t) for t in (self.bos, self.eos, self.mask))
        self.vocab: int = max(raw.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id"""

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
        config = tokenizer_config.read(file.with_name(FILES[1]))
        names = tokenizer_config.special_tokens(config, file.with_name(FILES[1]))
        # add_bos_token false: only the chat template uses BOS, documents get none
        begins = None if config.get("add_bos_token") is False else names.get("bos_token")
        source = tokenizer_config.template(file.with_name(TEMPLATE), config)
        try:
            return cls(
                raw,
                bos=(begins or names.get("cls_token")) if bos is None else bos,
                eos=(names.get("eos_token") or names.get("sep_token")) if eos is None else eos,
                mask=names.get("mask_token"),
                chat=ChatTemplate(source=source, tokens=names) if source else None,
            )
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as `transformers.PreTrainedTokenizerFast` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(self.raw.to_str(pretty=True), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": self.eos,
            "pad_token": self.eos,
            "clean_up_tokenization_spaces": False,
            **self.names,
        }
        if self.chat is not None:
            config["chat_template"] = self.chat.source
        (folder / FILES[1]).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @property
    def names(self) -> dict[str, Any]:
        """Special tokens by their names in `transformers` and templates, and whether BOS is added."""
        names: dict[str, Any] = dict(self.chat.tokens) if self.chat is not None else {}
        own = {"bos_token": self.bos, "eos_token": self.eos, "mask_token": self.mask}
        names |= {k: v for k, v in own.items() if v is not None}
        return names | ({"add_bos_token": False} if self.bos is None and "bos_token" in names else {})

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of each special token. Encoding a document never gives one of them."""
        return {t.content: i for i, t in self.raw.get_added_tokens_decoder().items() if t.special}

    @property
    def rows(self) -> int:
        """Rows that an embedding table needs. Special tokens other than BOS, EOS and mask may have higher ids, since
        encoded text never contains them: a text model may keep the tokenizer of an image model."""
        used = {self.bos_id, self.eos_id, self.mask_id}
        unused = {i for i in self.special_tokens.values() if i not in used}
        return 1 + max((i for i in self.raw.get_vocab(with_added_tokens=True).values() if i not in unused), default=-1)

    @property
    def special(self) -> Special:
        """The ids of the special tokens, and which of them are the mask and ends of a text."""
        named = {i for i in (self.bos_id, self.eos_id, self.mask_id) if i is not None}
        every = tuple(sorted({*self.special_tokens.values(), *named}))
        return Special(mask=self.mask_id, all=every, ends=end_tokens(self.eos_id))

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
        """The ids of one text, with BOS and EOS if requested and defined."""
        ids = self.raw.encode(text, add_special_tokens=False).ids
        return self._before * bos + ids + self._after * eos

    def encode_template(self, text: str) -> list[int]:
        """The ids of a chat template's output: here, and only here, special tokens are recognised in a text."""
        self.raw.encode_special_tokens = False
        try:
            return self.raw.encode(text, add_special_tokens=False).ids
        finally:
            self.raw.encode_special_tokens = True

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
        token_id = self.raw.token_to_id(token)
        if token_id is None:
            raise DataError(f"special token {token!r} is not in the vocabulary")
        return token_id


def _finish(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Sets the decoder, and puts BOS before a prompt that `transformers` encodes."""
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    return raw


def letters_of_bytes() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte, by byte value (the table of GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]
