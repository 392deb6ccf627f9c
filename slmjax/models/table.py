"""Rows that tie our parameters to those of another format. `convert/` reads them in both directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Ours <-> theirs, for one layer: the leading layer axis of ours is left out of `pattern`."""

    ours: str | tuple[str, ...]
    """Path(s) of ours. Several lie one after another along axis `split` of theirs."""
    theirs: str
    """Their key; `{}` stands for the layer number"""
    pattern: str
    """einops, theirs -> ours; export swaps the sides"""
    split: int | None = None
    """Axis of theirs along which several of ours are concatenated"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one class of `transformers` and our decoder say the same thing."""

    name: str
    """Human name, for messages and model cards"""
    model_type: str
    """`model_type` in config.json"""
    rows: Callable[[Any], tuple[Row, ...]]
    """decoder -> rows; each parameter of the decoder is covered exactly once"""
    to_config: Callable[[Any], dict[str, Any] | None]
    """decoder -> config.json, or None where this class cannot express the decoder exactly"""
    from_config: Callable[[Mapping[str, Any]], Any]
    """config.json -> decoder. Raises UserError naming the field that has no counterpart"""


def present(rows: tuple[Row, ...], paths: Collection[str]) -> tuple[Row, ...]:
    """The rows whose parameters exist: a family's table lists what it can have, a decoder has some of it."""
    return tuple(row for row in rows if (row.ours if isinstance(row.ours, str) else row.ours[0]) in paths)
