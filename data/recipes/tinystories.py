"""TinyStories (Eldan and Li 2023, arXiv:2305.07759): 2.1 million short stories in the words of a small child, 1.9 GB.

    slmjax data build data/recipes/tinystories.py --out runs/data/tinystories

Streamed from the Hugging Face hub. For a copy on disk: `recipe("path/to/folder")`.
"""

from slmjax.data.recipe import Recipe
from slmjax.data.sources import Hub
from slmjax.data.tokenizer import BPE


def recipe(path: str = "roneneldan/TinyStories") -> Recipe:
    """The training split; validation is held out of it, after duplicates are removed."""
    return Recipe(
        name="tinystories",
        sources=(
            Hub(
                name="TinyStories",
                path=path,
                licence="CDLA-Sharing-1.0",
                origin="https://huggingface.co/datasets/roneneldan/TinyStories",
            ),
        ),
        tokenizer=BPE(vocab=8192),
    )
