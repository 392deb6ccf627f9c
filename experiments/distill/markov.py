"""A source of text whose every probability is known, and a decoder that computes them exactly: a perfect teacher.

A Markov chain of order 1 over 64 letters; a document ends after each letter with probability 1/256. A decoder of one
layer that adds nothing holds it: the embedding of a token is a unit vector, and the output table has the logarithms of
the probabilities of what follows.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.models.decoder import Decoder
from slmjax.models.families.llama import llama
from slmjax.runs.folder import write_json
from slmjax.serialise import to_json
from slmjax.train.checkpoint_folder import save_params
from slmjax.tree import flatten, map_with_path

LETTERS = np.array([ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"])
END = 1 / 256
CONCENTRATION = 0.1
"""Of the Dirichlet distribution that the rows of the chain are drawn from: a few letters are likely after each"""
FLOOR = -30.0
"""Log-probability of what never follows: as good as 0, and finite"""


def chain(seed: int) -> np.ndarray:
    """Probabilities [65, 65] of what follows: row and column 64 are the beginning and the end of a document."""
    rng = np.random.default_rng(seed)
    n = len(LETTERS)
    follows = np.zeros((n + 1, n + 1))
    follows[:n, :n] = rng.dirichlet(np.full(n, CONCENTRATION), size=n) * (1 - END)
    follows[:n, n] = END
    follows[n, :n] = 1 / n
    return follows


def entropy(follows: np.ndarray) -> float:
    """Nats a token of the chain, in its stationary distribution: no model's loss is below it."""
    values, vectors = np.linalg.eig(follows.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    surprise = -np.sum(follows * np.log(np.maximum(follows, 1e-300)), axis=1)
    return float(np.sum(stationary / stationary.sum() * surprise))


def documents(follows: np.ndarray, letters: int, seed: int) -> list[str]:
    """Texts of at least this many letters together."""
    rng = np.random.default_rng(seed)
    cumulated, n = np.cumsum(follows, axis=1), len(LETTERS)
    found, text, state = 0, [], n
    texts = []
    while found < letters:
        state = min(int(np.searchsorted(cumulated[state], rng.random())), n)
        if state < n:
            text.append(chr(LETTERS[state]))
        elif text:
            texts.append("".join(text))
            found, text = found + len(text), []
    return texts


def recipe(texts: list[str], folder: Path, name: str) -> Recipe:
    """Of a token store with these documents."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    source = JSONL(name=name, path=str(file.resolve()), licence="generated")
    return Recipe(name=name, sources=(source,), dedup=None, tokenizer=Bytes(), validation=0.1)


def oracle() -> Decoder:
    """The shape of the perfect teacher."""
    return llama(layers=1, width=68, heads=2, kv_heads=2, hidden=8, vocab=264, context=128, tied=False, eps=1e-12)


def save_oracle(follows: np.ndarray, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder that every command takes as MODEL."""
    decoder, n = oracle(), len(LETTERS)
    ids = np.append(LETTERS, tokenizer.eos_id)
    embed, unembed = np.zeros((264, 68)), np.full((264, 68), FLOOR)
    embed[ids, np.arange(n + 1)] = 1
    embed[tokenizer.bos_id, n] = 1  # a document begins after either
    unembed[ids, : n + 1] = np.maximum(np.log(np.maximum(follows, 1e-300)), FLOOR).T
    tables = {
        "embed/table": embed,
        "unembed/table": unembed / np.sqrt(68),
    }  # the norm makes a unit vector sqrt(68) long

    def value(path: str, leaf: object) -> jnp.ndarray:
        shape = getattr(leaf, "shape", ())
        x = tables.get(path, np.ones(shape) if path.endswith("scale") else np.zeros(shape))
        return jnp.asarray(x, jnp.float32)

    shapes = jax.eval_shape(decoder.build().init, jax.random.key(0))
    params = map_with_path(value, shapes)
    assert set(tables) <= set(flatten(shapes))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"format": 1, "slmjax": "", "model": to_json(decoder), "imported": {}})
    save_params(folder / "checkpoints", params, {})
    tokenizer.save(folder)
