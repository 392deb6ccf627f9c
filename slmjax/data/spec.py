"""What an experiment says about its data: frozen values that JSON can hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from slmjax.data.packing import BestFit, Packing
from slmjax.data.recipe import Recipe
from slmjax.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Part:
    """One store of a mixture."""

    source: str | Recipe
    """A token store (folder or URL), a recipe file (.py), or a recipe: recipes are built when first needed"""
    weight: float = 1.0
    """Share of the sequences, relative to the other parts"""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise DataError(f"Part.weight is {self.weight}; expected a number above 0 (leave a part out instead of 0)")


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """A mixture of token stores, cut into sequences and shuffled globally."""

    train: tuple[Part, ...]
    validation: tuple[Part, ...] = ()
    """Stores whose validation split is evaluated on; empty means those of `train`"""
    length: int = 512
    """Tokens a sequence"""
    batch: int = 16
    """Sequences a step, over all hosts"""
    packing: Packing = field(default_factory=BestFit)
    seed: int = 0
    """Of the order of the sequences, which is another one in each epoch"""

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError("data.train is empty; give at least one Part")
        if not 2 <= self.length <= 1 << 24:
            raise DataError(f"data.length is {self.length}; expected 2 to {1 << 24} tokens a sequence")
        if self.batch < 1:
            raise DataError(f"data.batch is {self.batch}; expected at least 1 sequence a step")
        if not 0 <= self.seed < 1 << 32:
            raise DataError(f"data.seed is {self.seed}; expected 0 to {(1 << 32) - 1}")
