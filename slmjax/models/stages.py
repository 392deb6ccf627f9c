"""A list of layers as stages: what repeats is scanned over, so that it is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slmjax.models.decoder import Stage
from slmjax.nn.block import AnyBlock


def staged(blocks: Sequence[AnyBlock]) -> tuple[Stage, ...]:
    """All blocks in order -> stages that cover them: at each layer the longest repetition that starts there.

    a a b a a b c -> (a, a, b) x 2, (c) x 1. The same list always gives the same stages, hence the same parameter paths.
    """
    stages, alone, i = [], [], 0
    while i < len(blocks):
        period, repeats = _repetition(blocks, i)
        if repeats == 1:
            alone.append(blocks[i])
            i += 1
            continue
        if alone:
            stages.append(Stage(pattern=tuple(alone)))
            alone = []
        stages.append(Stage(pattern=tuple(blocks[i : i + period]), repeats=repeats))
        i += period * repeats
    return (*stages, Stage(pattern=tuple(alone))) if alone else tuple(stages)


def layers_of(blocks: Sequence[AnyBlock]) -> dict[str, Any]:
    """`staged(blocks)` as the fields `pattern`, `repeats` and `tail` of a Decoder."""
    first, *tail = staged(blocks)
    return {"pattern": first.pattern, "repeats": first.repeats, "tail": tuple(tail)}


def _repetition(blocks: Sequence[AnyBlock], start: int) -> tuple[int, int]:
    """(period, repeats) that covers most layers from `start` on; of several the shortest period; repeats 1 if none."""
    best = (1, 1)
    for period in range(1, (len(blocks) - start) // 2 + 1):
        unit, repeats = tuple(blocks[start : start + period]), 1
        while tuple(blocks[start + repeats * period : start + (repeats + 1) * period]) == unit:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best
