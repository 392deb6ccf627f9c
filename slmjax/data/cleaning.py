"""Cleaning of each document, before deduplication."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# C0 and C1 controls but tab and newline, the byte order mark, and lone surrogates (JSON can hold them, UTF-8 cannot).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_TRAILING = re.compile(r"[ \t]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Cleaning that keeps the meaning of a text; documents are not filtered by quality."""

    normalize: bool = True
    """Unicode NFC, so that each character has one encoding"""
    whitespace: bool = True
    """One kind of line end, no trailing blanks, at most one empty line in a row, none at the ends"""
    min_chars: int = 1
    """Shorter documents are dropped and counted as `too short`"""
    max_chars: int | None = None
    """Longer documents are dropped and counted as `too long`"""

    def __call__(self, text: str) -> tuple[str, str | None]:
        """text -> (clean text, None), or ("", the reason why the document is dropped)."""
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        if self.normalize and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        if self.whitespace:
            text = _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)).strip()
        if not text:
            return "", "empty"
        if len(text) < self.min_chars:
            return "", "too short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "", "too long"
        return text, None
