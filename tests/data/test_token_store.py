"""What was written is what is read; what was damaged is named; every place by URL behaves like a folder."""

import itertools
import json
import pickle
import shutil
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from data_corpora import recipe_of, sentences, write_jsonl

from slmjax.data.build import build
from slmjax.data.loader import Loader
from slmjax.data.spec import PackedText, Part
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import BPE
from slmjax.errors import DataError

pytestmark = pytest.mark.fast


def texts_of(store, split):
    tokens, tokenizer = store.tokens(split), store.tokenizer()
    out = []
    for block in store.offsets(split, documents=7):
        out += [tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(block)]
    return out


def read_all(store):
    return store.tokens("train")[0 : store.count("train", "tokens")], list(store.offsets("train"))


def folder_of(store):
    return Path(urlparse(store.location).path)


@pytest.fixture
def copied(store, tmp_path):
    """A store that a test may damage."""
    shutil.copytree(folder_of(store), tmp_path / "copy")
    return tmp_path / "copy"


def test_round_trip(store):
    train, validation = texts_of(store, "train"), texts_of(store, "validation")
    assert sorted(train + validation) == sorted(sentences(300))
    assert train == [t for t in sentences(300) if t in set(train)], "documents keep the order of the source"
    assert 30 < len(validation) < 90


def test_documents_begin_with_bos_and_end_with_eos(store):
    tokens = store.tokens("train")
    for block in store.offsets("train"):
        assert {int(tokens[a : a + 1][0]) for a in block[:-1].tolist()} == {256}
        assert {int(tokens[b - 1 : b][0]) for b in block[1:].tolist()} == {257}


def test_counts(store):
    manifest, train = store.manifest, texts_of(store, "train")
    assert store.count("train", "documents") == len(train)
    assert store.count("train", "bytes") == sum(len(t.encode()) for t in train)
    assert store.count("train", "tokens") == sum(len(t.encode()) + 2 for t in train) == len(store.tokens("train"))
    assert manifest["tokens_per_byte"] == manifest["tokens"] / manifest["bytes"]
    assert manifest["documents"] == {"read": 300, "kept": 300, "dropped": {}}
    assert manifest["sources"][0]["licence"] == "CC0-1.0"
    assert store.tokens("train").shards() == -(-store.count("train", "tokens") // (1 << 15)) >= 2
    store.verify()


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = BPE(vocab=300).make(sentences(50), tmp_path)
    tokenizer.raw.add_tokens([f"<extra{i}>" for i in range(70_000)])
    tokenizer.save(tmp_path / "wide")
    from slmjax.data.tokenizer import File

    path = write_jsonl(tmp_path / "a.jsonl", ["small <extra69999> large"] * 3)
    store = build(recipe_of(path, tokenizer=File(path=str(tmp_path / "wide"))), tmp_path / "out", workers=1)
    assert store.manifest["dtype"] == "uint32"
    assert max(store.tokens("train")[0 : store.count("train", "tokens")]) > 1 << 16


@pytest.mark.parametrize("name", ["train/tokens/c/0", "train/tokens/c/1", "train/offsets/c/0"])
def test_a_flipped_bit_names_the_shard(copied, name):
    path = copied / name
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    store = TokenStore(copied)
    with pytest.raises(DataError, match=f"{name}: corrupt shard"):
        store.verify()
    with pytest.raises(DataError, match=f"{name}: corrupt shard"):
        read_all(store)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_lost_shard_is_named(copied, damage):
    path = copied / "train/tokens/c/1"
    path.write_bytes(path.read_bytes()[:1000]) if damage == "truncated" else path.unlink()
    store = TokenStore(copied)
    with pytest.raises(DataError, match="train/tokens/c/1: corrupt shard"):
        store.tokens("train")[0 : store.count("train", "tokens")]
    with pytest.raises(DataError, match="train/tokens/c/1"):
        store.verify()


def test_the_loader_names_a_corrupt_shard(copied, tmp_path):
    path = copied / "train/tokens/c/0"
    raw = bytearray(path.read_bytes())
    for i in range(0, 1 << 15, 256):
        raw[i] ^= 1
    path.write_bytes(raw)
    loader = Loader(PackedText(train=(Part(source="x"),), length=32, batch=8), [TokenStore(copied)], cache=tmp_path)
    with pytest.raises(DataError, match="train/tokens/c/0: corrupt shard"):
        list(itertools.islice(loader, 100))


def test_a_changed_tokenizer_is_refused(copied):
    path = copied / "tokenizer.json"
    path.write_text(path.read_text().replace('"use_regex": false', '"use_regex": true'))
    with pytest.raises(DataError, match=r"tokenizer.json is not the one that wrote this store"):
        TokenStore(copied).tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is not of format"),
        (lambda m: m.update(version=99), "is not of format"),
        (lambda m: m.pop("fingerprint"), "manifest.json is damaged"),
    ],
)
def test_manifests_that_are_not_ours(copied, change, message):
    manifest = json.loads((copied / "manifest.json").read_text())
    change(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        TokenStore(copied)


def test_no_store_there(tmp_path):
    with pytest.raises(DataError, match="no token store there"):
        TokenStore(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        TokenStore("nonsense://bucket/store")


def test_by_url(tmp_path):
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", sentences(20)))
    by_url = build(recipe, f"file://{tmp_path}/url", workers=1)
    by_path = build(recipe, tmp_path / "path", workers=1)
    assert by_url.fingerprint == by_path.fingerprint
    assert TokenStore(f"file://{tmp_path}/path/").tokenizer_path == tmp_path / "path"


def test_arrays_travel_to_other_processes(store):
    array = store.tokens("train")
    assert (pickle.loads(pickle.dumps(array))[5:50] == array[5:50]).all()
    assert array[5:50].dtype == np.uint16


@pytest.mark.parametrize(
    "at",
    [slice(None), slice(3), slice(-5, None), slice(2, 40, 7), slice(40, 2, -7), slice(None, None, -1), slice(9, 3)],
    ids=str,
)
def test_an_array_is_indexed_like_numpy(store, at):
    whole = np.asarray(store.tokens("train"))
    assert len(whole) == store.count("train", "tokens")
    np.testing.assert_array_equal(store.tokens("train")[at], whole[at])
    assert store.tokens("train")[-2] == whole[-2]
    np.testing.assert_array_equal(store.boundaries("train")[:5], next(store.offsets("train"))[:5])
    with pytest.raises(IndexError):
        store.tokens("train")[len(whole)]
