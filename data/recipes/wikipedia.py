"""English Wikipedia, November 2023, as plain text: 6.4 million articles, 20 GB.

    slmjax data build data/recipes/wikipedia.py --out runs/data/wikipedia

Streamed from the Hugging Face hub. Other languages: `recipe(language="es")`, "de", ...
"""

from slmjax.data.cleaning import Clean
from slmjax.data.recipe import Recipe
from slmjax.data.sources import Hub
from slmjax.data.tokenizer import BPE


def recipe(path: str = "wikimedia/wikipedia", language: str = "en") -> Recipe:
    """Articles of at least 200 characters: shorter ones are mostly redirects and stubs."""
    return Recipe(
        name=f"wikipedia_{language}",
        sources=(
            Hub(
                name=f"Wikipedia ({language})",
                path=path,
                config=f"20231101.{language}",
                licence="CC-BY-SA-4.0",
                origin="https://huggingface.co/datasets/wikimedia/wikipedia",
            ),
        ),
        clean=Clean(min_chars=200),
        tokenizer=BPE(vocab=32768),
        validation=0.001,
    )
