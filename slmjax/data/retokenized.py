"""The text of each row in the tokens of another tokenizer, and which of the two kinds of tokens end at the same byte.

A teacher with its own tokenizer reads the text that its student reads. Where a token of each ends at the same byte,
both predict what follows the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from slmjax.data.extra import Extra
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import Tokenizer, letters_of_bytes
from slmjax.errors import UserError
from slmjax.files import at
from slmjax.types import Batch


class Aligned(NamedTuple):
    """The text of one row in other tokens, int32."""

    tokens: np.ndarray  # [U]
    positions: np.ndarray  # [U]: within the document, from 0
    segment_ids: np.ndarray  # [U]: those of the row's tokens; 0 is padding
    at: np.ndarray  # [T]: for each token of the row, the other token that ends where it ends; -1: none does


@dataclass(frozen=True, kw_only=True)
class Retokenized(Extra):
    """`Batch.extra` holds the fields of `Aligned`, [B, U] and [B, T], their names beginning with `other_`.

    Where a row begins or ends within a character, its incomplete bytes are left out. The other tokenizer sees each
    document of a row from where the row begins it. Tokens that do not fit `length` are dropped.
    """

    data: str
    """The token store that is read, or another folder with its tokenizer.json"""
    other: str
    """A folder with the other tokenizer.json, such as the teacher's"""
    length: int
    """U: room for the other tokens of a row"""

    def __post_init__(self):
        if self.length < 2:
            raise UserError(f"data.extra.length is {self.length}; expected room for at least 2 tokens a row")

    @cached_property
    def own(self) -> Tokenizer:
        return _tokenizer(self.data, "data.extra.data")

    @cached_property
    def theirs(self) -> Tokenizer:
        return _tokenizer(self.other, "data.extra.other")

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of each of the data's tokens; b"" for special ones."""
        return bytes_of_tokens(self.own)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [vocabulary]: the number of bytes of each."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Without tokenizers, for processes that read ahead."""
        return {"data": self.data, "other": self.other, "length": self.length}

    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        ids, segments = (np.asarray(x) for x in (batch.tokens, batch.segment_ids))
        rows = [self.row(*row) for row in zip(ids, segments, strict=True)]
        return {f"other_{name}": np.stack([getattr(row, name) for row in rows]) for name in Aligned._fields}

    def row(self, ids: np.ndarray, segments: np.ndarray) -> Aligned:
        """One row: token ids and segment ids, int32 [T]."""
        tokens, positions, numbers = (np.zeros(self.length, np.int32) for _ in range(3))
        at, used = np.full(len(ids), -1, np.int32), 0
        for segment in range(1, int(segments.max(initial=0)) + 1):
            where = np.flatnonzero(segments == segment)
            found, ends = self._encoded(ids[where])
            room = min(len(found), self.length - used)
            into = slice(used, used + room)
            tokens[into], positions[into], numbers[into] = found[:room], np.arange(room), segment
            at[where] = np.where((ends >= 0) & (ends < room), ends + used, -1)
            used += room
        return Aligned(tokens, positions, numbers, at)

    def _encoded(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The data's tokens of one document [m] -> other ids [n], and for each of the data's tokens the index of the
        last other one that ends at the same byte, or -1: [m]."""
        whole = b"".join(map(self.pieces.__getitem__, ids.tolist()))
        first = next((i for i, byte in enumerate(whole[:3]) if byte & 0xC0 != 0x80), min(3, len(whole)))
        text = whole[first:].decode("utf-8", errors="ignore") if first < len(whole) else ""
        encoding = self.theirs.raw.encode(text, add_special_tokens=False)
        begin = [] if self.theirs.bos_id is None else [self.theirs.bos_id]
        # Offsets count characters: the byte after character c is bytes_to[c]. A token ends within a character if the
        # next one begins before its own last character is over.
        spelled = np.frombuffer(text.encode(), np.uint8)
        bytes_to = np.append(np.flatnonzero(spelled & 0xC0 != 0x80), len(spelled)) + first
        starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        whole_character = np.append(starts[1:] >= stops[:-1], True)[: len(stops)]
        stops = np.where(whole_character, bytes_to[stops], 0)
        stops = np.concatenate([np.full(len(begin), first), stops])
        last = np.full(len(whole) + 1, -1)
        last[stops] = np.arange(len(stops))
        last[:first], last[first] = -1, len(begin) - 1
        sizes = self.sizes[ids]
        ends = last[np.cumsum(sizes)]
        ends[1:][sizes[1:] == 0] = -1  # what follows the end of a document is another one
        return np.array(begin + encoding.ids, np.int32), ends

    def fits(self, stores: Sequence[TokenStore]) -> None:
        for store in stores:
            if store.tokenizer_fingerprint != self.own.fingerprint:
                raise UserError(
                    f"data.extra.data: {self.data} has the tokenizer {self.own.fingerprint[:12]}, and {store.name}, "
                    f"which data reads, has {store.tokenizer_fingerprint[:12]}; name the store itself"
                )

    def identity(self) -> Any:
        found = {"data": self.own.fingerprint, "other": self.theirs.fingerprint, "length": self.length}
        return {"$type": "Retokenized", **found}


def bytes_of_tokens(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of UTF-8 that each token id stands for; b"" for special tokens and for ids without a token.

    Raises:
        UserError: the tokenizer does not spell bytes (ByteLevel, as GPT-2 and Llama 3 do), so that the text of a token
            depends on its neighbours.
    """
    spec = tokenizer.raw.to_str()
    if "ByteLevel" not in spec:
        raise UserError(
            "data.extra.data: this tokenizer is not byte-level, so the bytes of a token are not known alone"
        )
    added = tokenizer.raw.get_added_tokens_decoder()
    letters = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    vocab = tokenizer.raw.get_vocab(with_added_tokens=True)
    found = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        if i in added:
            found[i] = b"" if added[i].special else added[i].content.encode()
        else:
            found[i] = bytes(letters[letter] for letter in token)
    return tuple(found)


def _tokenizer(place: str, field: str) -> Tokenizer:
    folder = at(place)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    raise UserError(f"{field}: {place} has no tokenizer.json; name a folder with one, such as a run or a token store")
