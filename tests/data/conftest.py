"""Small stores, made once a session."""

import pytest
from data_corpora import recipe_of, sentences, write_jsonl

from slmjax.data.build import build
from slmjax.data.tokenizer import BPE


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """300 documents in bytes, small shards so that there are several."""
    folder = tmp_path_factory.mktemp("store")
    recipe = recipe_of(write_jsonl(folder / "store.jsonl", sentences(300)))
    return build(recipe, folder / "out", workers=1, shard=1 << 15)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A second, smaller store with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    return build(recipe_of(write_jsonl(folder / "other.jsonl", sentences(90, seed=1))), folder / "out", workers=1)


@pytest.fixture(scope="session")
def bpe_store(tmp_path_factory):
    """A store whose tokenizer was trained on its text."""
    folder = tmp_path_factory.mktemp("bpe")
    recipe = recipe_of(write_jsonl(folder / "bpe.jsonl", sentences(200, seed=2)), tokenizer=BPE(vocab=300))
    return build(recipe, folder / "out", workers=1)
