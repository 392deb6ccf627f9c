"""Checkpoints: asynchronous, atomic, checksummed; a bad one is set aside and the previous good one used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save and what to keep. The last step is always saved."""

    every: int = 1000
    """Steps between saves; 0 saves by `seconds` and at the end only"""
    seconds: float = 1800
    """Wall-clock seconds between saves at most; 0 for none"""
    keep_last: int = 3
    """The newest ones kept"""
    keep_every: int = 0
    """Steps that are multiples of this are kept forever; 0 for none"""
    best: str = ""
    """A metric, less is better (`validation/loss`): the best one is saved and kept as well; empty for none"""
