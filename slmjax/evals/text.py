"""Converts a stream of tokens to text: only complete characters, and nothing of a stop string."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from slmjax.errors import UserError

REPLACEMENT = "\ufffd"
PENDING = 3  # a character of UTF-8 has at most 4 bytes: at most 3 may wait for the last one
LEAD = 8  # earlier tokens decoded as context, since some decoders drop the space before the first token


class Detokenizer:
    """Takes token ids as they are generated and returns the text that no later token can change.

    Decoding token by token is wrong: a character may span tokens, and a decoder may treat the first token differently.
    So a window of recent tokens is decoded as a whole, and text that was returned before is left out. With a byte-level
    tokenizer the pieces joined equal the decoding of all tokens at once, valid UTF-8 or not. Special tokens are
    skipped.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; `prompt` the ids before the first generated one."""
        self.tokenizer = tokenizer
        self.window = list(prompt[-LEAD:])
        self.given = len(self._decode(self.window))

    def push(self, ids: Sequence[int]) -> str:
        """More tokens -> the text that can now no longer change."""
        self.window.extend(ids)
        text = self._decode(self.window)
        certain = len(text) - pending(text)
        new, self.given = text[self.given : certain], max(self.given, certain)
        if certain == len(text) and len(self.window) > 4 * LEAD:
            recent = self._decode(self.window[-LEAD:])
            if not recent.startswith(REPLACEMENT):  # else the window would begin inside a character
                self.window, self.given = self.window[-LEAD:], len(recent)
        return new

    def close(self) -> str:
        """The remaining text, which was held back as an incomplete character."""
        text = self._decode(self.window)
        new, self.given = text[self.given :], len(text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Ends a stream of text before the first stop string, even if the stop string spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UserError("stop string '' is empty; it would stop before the first character")
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """More text -> text that may be shown. What may be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        self.held += text
        matches = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if matches:
            _, at = min(matches)  # the first to be complete
            self.stopped = True
            shown, self.held = self.held[:at], ""
            return shown
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def close(self) -> str:
        """The text that was held back, which is not a stop string after all."""
        shown, self.held = self.held, ""
        return shown


def pending(text: str) -> int:
    """Number of replacement characters at the end, whose bytes may be the beginning of an incomplete character."""
    tail = text[-PENDING:]
    return len(tail) - len(tail.rstrip(REPLACEMENT))


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_bytes(tokenizer: Any) -> list[int]:
    """Bytes of UTF-8 text of each token id: [vocabulary]. Special tokens have 0.

    Byte-level tokenizers spell one byte as one character; sentencepiece-style ones spell a space as U+2581 and a raw
    byte as <0xNN>.
    """
    spec = json.loads(tokenizer.to_str())
    special = {t["id"] for t in spec.get("added_tokens", ()) if t.get("special")}
    byte_level = "ByteLevel" in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    sizes = [0] * (max(vocab.values(), default=-1) + 1)
    plain = {t["id"] for t in spec.get("added_tokens", ())}
    for token, i in vocab.items():
        if i in special:
            continue
        if byte_level and i not in plain:
            size = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            size = 1
        else:
            size = len(token.replace("\u2581", " ").encode())
        sizes[i] = size
    return sizes
