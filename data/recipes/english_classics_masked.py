"""Shakespeare, Jane Austen and Moby-Dick with a tokenizer that has a mask token, for encoders.

    slmjax data build data/recipes/english_classics_masked.py --out runs/data/english_classics_masked

The texts of english_classics.py, BPE with 4096 ids; a few seconds on two CPU cores, no network.
"""

from dataclasses import replace
from pathlib import Path

from slmjax.data.recipe import Recipe, load_recipe
from slmjax.data.tokenizer import MaskedBPE


def recipe() -> Recipe:
    """As english_classics.py, but for the tokenizer."""
    base = load_recipe(Path(__file__).with_name("english_classics.py"))
    return replace(base, name="english_classics_masked", tokenizer=MaskedBPE(vocab=4096))
