"""FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557): educational web pages, the first million of the 10B-token sample.

    slmjax data build data/recipes/fineweb_edu.py --out runs/data/fineweb_edu

Streamed from the Hugging Face hub: about 5 GB of text, a billion tokens. Raise `documents` for more.
"""

from slmjax.data.recipe import Recipe
from slmjax.data.sources import Hub
from slmjax.data.tokenizer import BPE


def recipe(path: str = "HuggingFaceFW/fineweb-edu", documents: int = 1_000_000) -> Recipe:
    """The first `documents` pages. FineWeb removed near duplicates within each crawl; here it is done over all."""
    return Recipe(
        name="fineweb_edu",
        sources=(
            Hub(
                name="FineWeb-Edu",
                path=path,
                config="sample-10BT",
                limit=documents,
                licence="ODC-By-1.0",
                origin="https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
            ),
        ),
        tokenizer=BPE(vocab=32768),
        validation=0.001,
    )
