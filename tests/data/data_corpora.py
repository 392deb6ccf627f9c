"""Small corpora for the tests of data."""

import json

import numpy as np

from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import Bytes

TEXT = "the whale sea ship captain sailed storm night harpoon deck wind old white men water under over long far home"
WORDS = TEXT.split()


def sentences(count, seed=0, longest=60):
    """Documents of random words, all different."""
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest))) + "." for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


def recipe_of(path, **fields):
    """A recipe over one JSONL file; bytes as tokens, nothing removed, unless said otherwise."""
    return Recipe(
        **{
            "name": path.stem,
            "sources": (JSONL(path=str(path), licence="CC0-1.0"),),
            "tokenizer": Bytes(),
            "dedup": None,
            "validation": 0.2,
        }
        | fields
    )
