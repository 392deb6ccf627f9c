"""The loop: data in, steps out, everything else a hook."""

from __future__ import annotations

from typing import NamedTuple


class Speed(NamedTuple):
    """What turns tokens a second into model-FLOPs utilisation."""

    flops_per_token: float
    """Training FLOPs (forward and backward)"""
    peak_flops: float
    """FLOP/s of all devices together, measured or published"""
