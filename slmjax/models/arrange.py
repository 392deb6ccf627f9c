"""Groups a sequence of layers into stages, each of which is one scan over repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder, Stage
from slmjax.nn.block import AnyBlock


def arranged(blocks: Sequence[AnyBlock]) -> tuple[Stage, ...]:
    """The division of these layers into stages that compiles fastest: each block of a pattern is compiled once, however
    often it is repeated.

    Example: 26 layers of which each sixth differs become a pattern of six blocks, repeated four times, and then one
    block, repeated twice.
    """
    kinds = [blocks.index(block) for block in blocks]  # numbers compare faster than blocks
    best: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]  # cost, (length of pattern, repeats) of each stage
    for first in reversed(range(len(kinds))):
        rest = kinds[first:]
        candidates = []
        for n in range(1, len(rest) + 1):
            repeats = _repeats(rest, n)
            cost, stages = best[len(rest) - n * repeats]
            candidates.append((cost + n + 1, ((n, repeats), *stages)))  # 1 is the cost of the loop itself
        best.append(min(candidates, key=lambda x: (x[0], len(x[1]), -x[1][0][0] * x[1][0][1])))
    out, first = [], 0
    for n, repeats in best[len(kinds)][1]:
        out.append(Stage(pattern=tuple(blocks[first : first + n]), repeats=repeats))
        first += n * repeats
    return tuple(out)


def layers_of(blocks: Sequence[AnyBlock]) -> dict[str, Any]:
    """`arranged(blocks)` as the fields `pattern`, `repeats` and `tail` of a Decoder.

    Raises:
        UserError: there are no blocks.
    """
    if not blocks:
        raise UserError("model: 0 layers; give at least one")
    first, *tail = arranged(blocks)
    return {"pattern": first.pattern, "repeats": first.repeats, "tail": tuple(tail)}


def repeated(block: AnyBlock, layers: int, **fields: Any) -> Decoder:
    """A decoder of `layers` equal blocks. `fields`: further fields of `Decoder`; its final norm is the block's norm by
    default."""
    return Decoder(**{"pattern": (block,), "repeats": layers, "final_norm": block.norm, **fields})


def _repeats(kinds: Sequence[int], n: int) -> int:
    """How many times in a row the first n kinds are repeated at the start."""
    repeats = 1
    while kinds[repeats * n : (repeats + 1) * n] == kinds[:n]:
        repeats += 1
    return repeats
