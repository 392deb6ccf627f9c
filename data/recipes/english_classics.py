"""Shakespeare, Jane Austen and Moby-Dick: 10 MB of English that ships with slmjax (public domain), for the quickstart.

    slmjax data build data/recipes/english_classics.py --out runs/data/english_classics

BPE with 4096 ids, about 3 million tokens; a few seconds on two CPU cores, no network.
"""

from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import BPE

BOOKS = "../english_classics"


def recipe() -> Recipe:
    """All three, two percent of the scenes and chapters held out."""
    return Recipe(
        name="english_classics",
        sources=(
            JSONL(name="Shakespeare", path=f"{BOOKS}/shakespeare.jsonl.zst", licence="public domain"),
            JSONL(name="Jane Austen", path=f"{BOOKS}/austen.jsonl.zst", licence="public domain"),
            JSONL(name="Moby-Dick", path=f"{BOOKS}/moby_dick.jsonl.zst", licence="public domain"),
        ),
        tokenizer=BPE(vocab=4096),
        validation=0.02,
    )
