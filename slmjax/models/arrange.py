"""Layers in order -> stages that a scan can repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder, Stage
from slmjax.nn.block import AnyBlock


def arranged(blocks: Sequence[AnyBlock]) -> tuple[Stage, ...]:
    """The stages of these layers that compile fastest: the compiler sees each block of a pattern once, however often
    it is repeated.

    26 layers of which each sixth differs become a pattern of six, four times, and then one block, twice.
    """
    kinds = [blocks.index(block) for block in blocks]  # numbers compare faster than blocks
    best: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]  # cost, (length of pattern, repeats) of each stage
    for first in reversed(range(len(kinds))):
        rest = kinds[first:]
        found = []
        for n in range(1, len(rest) + 1):
            repeats = _repeats(rest, n)
            cost, stages = best[len(rest) - n * repeats]
            found.append((cost + n + 1, ((n, repeats), *stages)))  # one more for the loop itself
        best.append(min(found, key=lambda x: (x[0], len(x[1]), -x[1][0][0] * x[1][0][1])))
    out, first = [], 0
    for n, repeats in best[len(kinds)][1]:
        out.append(Stage(pattern=tuple(blocks[first : first + n]), repeats=repeats))
        first += n * repeats
    return tuple(out)


def layers_of(blocks: Sequence[AnyBlock]) -> dict[str, Any]:
    """`arranged(blocks)` as the fields `pattern`, `repeats` and `tail` of a Decoder.

    Raises:
        UserError: there are none.
    """
    if not blocks:
        raise UserError("model: 0 layers; give at least one")
    first, *tail = arranged(blocks)
    return {"pattern": first.pattern, "repeats": first.repeats, "tail": tuple(tail)}


def repeated(block: AnyBlock, layers: int, **fields: Any) -> Decoder:
    """`layers` times this block; `fields` are further ones of `Decoder`, whose final norm is else that of the block."""
    return Decoder(**{"pattern": (block,), "repeats": layers, "final_norm": block.norm, **fields})


def _repeats(kinds: Sequence[int], n: int) -> int:
    """How often the first n come in a row."""
    repeats = 1
    while kinds[repeats * n : (repeats + 1) * n] == kinds[:n]:
        repeats += 1
    return repeats
