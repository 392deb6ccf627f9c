"""A recipe says how a token store is made from text. A recipe file is Python with `def recipe() -> Recipe`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax.data.cleaning import Clean
from slmjax.data.dedup import Dedup
from slmjax.data.sources import Source
from slmjax.data.tokenizer import BPE, TokenizerSpec
from slmjax.errors import DataError, UserError
from slmjax.files import at
from slmjax.serialise import to_json
from slmjax.user_code import find_beside, mistakes_in


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sources -> cleaning -> deduplication -> tokenizer -> token store."""

    name: str
    sources: tuple[Source, ...]
    clean: Clean = field(default_factory=Clean)
    dedup: Dedup | None = field(default_factory=Dedup)
    """None keeps every duplicate"""
    tokenizer: TokenizerSpec = field(default_factory=BPE)
    validation: float = 0.01
    """Fraction of the documents that go into the validation split, chosen by a hash of their text"""
    root: str = "."
    """What the paths of the sources are relative to; `load_recipe` sets the folder of the recipe file"""

    def __post_init__(self) -> None:
        if not isinstance(self.sources, tuple | list):
            raise DataError(f"recipe {self.name!r}: sources is {self.sources!r}; expected a tuple: (source,)")
        if not self.sources:
            raise DataError(f"recipe {self.name!r} has no sources")
        for field_name, values, kind, what in (
            ("sources", self.sources, Source, "Text, JSONL, Parquet, Folder or Hub"),
            ("tokenizer", (self.tokenizer,), TokenizerSpec, "Bytes, BPE or File"),
            ("clean", (self.clean,), Clean, "Clean"),
            ("dedup", (self.dedup,), Dedup | None, "Dedup or None"),
        ):
            for value in values:
                if not isinstance(value, kind):
                    raise DataError(f"recipe {self.name!r}: {field_name} has {value!r}; expected {what}")
        if not 0 <= self.validation < 1:
            raise DataError(f"recipe {self.name!r}: validation is {self.validation}; expected a fraction in [0, 1)")

    def files(self) -> list[list[Path]]:
        """The local files of each source."""
        return [source.files(at(self.root)) for source in self.sources]

    def tokenizer_files(self) -> list[Path]:
        """The local files of the tokenizer; none if it is trained."""
        return self.tokenizer.files(at(self.root))

    def identity(self) -> dict[str, Any]:
        """This recipe as JSON, without `root`: together with the contents of its files it decides the store. What is
        done with bad records is left out where it is as ever: it decides nothing then."""
        described = {name: value for name, value in to_json(self).items() if name != "root"}
        for source in described["sources"]:
            if source.get("on_error") == "raise":
                del source["on_error"], source["max_bad"]
        return described


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a Python file.

    Raises:
        UserError: no such file, no function `recipe`, it fails, or it returns something else.
    """
    path = at(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path}: {'not' if path.exists() else 'no such'} recipe file; expected Python (.py)")
    find_beside(path)
    with mistakes_in(path, str(path)):
        make = runpy.run_path(str(path), run_name="slmjax_recipe").get("recipe")
        if not callable(make):
            raise UserError(f"{path}: has no function recipe(); a recipe file defines `def recipe() -> Recipe`")
        recipe = make()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: recipe() returned {type(recipe).__name__}, expected Recipe")
    if recipe.root == ".":
        recipe = dataclasses.replace(recipe, root=str(path.resolve().parent))
    return recipe


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
