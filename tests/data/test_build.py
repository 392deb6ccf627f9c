"""Builds: what is dropped and counted, what a killed build leaves, and what is refused."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from data_corpora import recipe_of, sentences, write_jsonl

from slmjax.data.build import build, open_source
from slmjax.data.cleaning import Clean
from slmjax.data.dedup import Dedup
from slmjax.data.recipe import Recipe, load_recipe
from slmjax.data.sources import JSONL, Source
from slmjax.data.token_store import CHUNK, TokenStore
from slmjax.data.tokenizer import BPE, File, Tokenizer, TokenizerSpec
from slmjax.errors import DataError, UserError

RECIPE_FILE = """
from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import BPE

def recipe():
    return Recipe(name="killed", sources=(JSONL(path="corpus.jsonl", licence="CC0-1.0"),), tokenizer=BPE(vocab=512))
"""
BUILD = """
import sys
from slmjax.data.build import build
from slmjax.data.recipe import load_recipe
if __name__ == "__main__":
    build(load_recipe(sys.argv[1]), sys.argv[2], workers=2, shard=1 << 16, part_bytes=40_000)
"""


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_at_any_moment_a_build_continues_to_the_same_bytes(tmp_path):
    """SIGKILL again and again, at random moments, until one gets through: the store is that of an undisturbed build."""
    write_jsonl(tmp_path / "corpus.jsonl", sentences(4000, longest=80))
    recipe, program, out = tmp_path / "recipe.py", tmp_path / "build.py", tmp_path / "out"
    recipe.write_text(RECIPE_FILE)
    program.write_text(BUILD)
    expected = build(load_recipe(recipe), tmp_path / "expected", workers=1, shard=1 << 16, part_bytes=40_000)
    rng, kills, killed_with_work = random.Random(0), 0, 0
    while not out.exists():
        process = subprocess.Popen([sys.executable, program, recipe, out], start_new_session=True)
        try:
            # later attempts live longer, so that it ends on a slow machine too
            process.wait(timeout=0.4 + rng.random() * (1 + kills / 2))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            killed_with_work += any((tmp_path / "out.building").rglob("*.npz"))
            assert not out.exists() or (out / "manifest.json").exists()
        else:
            assert process.returncode == 0
    assert killed_with_work >= 1, "it was never killed in the middle: the test proves nothing"
    assert tree(out) == tree(tmp_path / "expected")
    assert TokenStore(out).fingerprint == expected.fingerprint
    assert not (tmp_path / "out.building").exists()


def test_finished_parts_are_not_done_again(tmp_path, monkeypatch):
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", sentences(200)))
    from slmjax.data import stages

    real, calls = stages._tokenise_part, []

    def failing(context, index, split):
        calls.append(index)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        real(context, index, split)

    monkeypatch.setattr(stages, "_tokenise_part", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        build(recipe, tmp_path / "out", workers=1, part_bytes=4000)
    monkeypatch.setattr(stages, "_clean_part", None)  # cleaning is finished: calling it would fail
    build(recipe, tmp_path / "out", workers=1, part_bytes=4000)
    assert calls[:4] == [0, 1, 2, 2]
    assert sorted(set(calls)) == list(range(max(calls) + 1))
    assert len(calls) == max(calls) + 2


def test_work_of_another_recipe_is_not_used(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(50))
    from slmjax.data import writing

    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_manifest", None)
        with pytest.raises(TypeError):
            build(recipe_of(path), tmp_path / "out", workers=1)
    write_jsonl(path, sentences(50, seed=9))
    build(recipe_of(path), tmp_path / "out", workers=1)
    fresh = build(recipe_of(path), tmp_path / "fresh", workers=1)
    assert TokenStore(tmp_path / "out").fingerprint == fresh.fingerprint


def test_the_number_of_workers_changes_nothing(tmp_path):
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", sentences(300)), dedup=Dedup(), tokenizer=BPE(vocab=300))
    one = build(recipe, tmp_path / "one", workers=1, part_bytes=8000)
    two = build(recipe, tmp_path / "two", workers=2, part_bytes=8000)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert one.fingerprint == two.fingerprint


def test_what_is_dropped_is_counted(tmp_path):
    texts = sentences(40, longest=80)
    near = texts[0].replace("0-0", "0-0 almost")
    long = " ".join(f"w{i}" for i in range(300))
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[3], "", "tiny", near, long, long + " more"])
    store = build(recipe_of(path, dedup=Dedup(), clean=Clean(min_chars=6)), tmp_path / "out", workers=1, part_bytes=999)
    dropped = store.manifest["documents"]["dropped"]
    short = sum(len(t) < 6 for t in texts)
    assert (dropped["empty"], dropped["too short"], dropped["exact duplicate"]) == (1, 1 + short, 1)
    assert 1 <= dropped["near duplicate"] <= 2
    documents = store.manifest["documents"]
    assert documents["read"] == 46 == documents["kept"] + sum(dropped.values())
    assert sum(store.count(split, "documents") for split in ("train", "validation")) == documents["kept"]


def test_the_split_depends_on_the_text_alone(tmp_path):
    """More text moves no document from one split to the other."""
    few = build(recipe_of(write_jsonl(tmp_path / "a.jsonl", sentences(100))), tmp_path / "few", workers=1)
    many = build(recipe_of(write_jsonl(tmp_path / "b.jsonl", sentences(400)[::-1])), tmp_path / "many", workers=1)
    held = [_documents(s, "validation") for s in (few, many)]
    assert held[0] == held[1] & (_documents(few, "train") | held[0])
    assert abs(many.count("validation", "documents") / 400 - 0.2) < 0.08


def _documents(store, split):
    tokens = store.tokens(split)
    return {tokens[a:b].tobytes() for o in store.offsets(split) for a, b in itertools.pairwise(o)}


@pytest.mark.parametrize(("texts", "train", "validation"), [(["one", "two"], 1, 1), (["one"], 1, 0)])
def test_tiny_corpora_have_something_in_each_split(tmp_path, texts, train, validation):
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", texts), validation=0.001)
    store = build(recipe, tmp_path / "out", workers=1)
    assert [store.count(s, "documents") for s in ("train", "validation")] == [train, validation]


def test_sources_are_accounted_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a a", "b b"])
    write_jsonl(tmp_path / "b.jsonl", ["c c", "a a"])
    sources = tuple(JSONL(path=f"{n}.jsonl", name=n, licence=f"licence {n}", origin="book") for n in "ab")
    recipe = dataclasses.replace(recipe_of(tmp_path / "x.jsonl"), sources=sources, dedup=Dedup(), root=str(tmp_path))
    manifest = build(recipe, tmp_path / "out", workers=1).manifest
    assert [(s["name"], s["licence"], s["documents_read"], s["documents_kept"]) for s in manifest["sources"]] == [
        ("a", "licence a", 2, 2),
        ("b", "licence b", 2, 1),
    ]
    (file,) = manifest["sources"][0]["files"]
    assert file["path"] == "a.jsonl"
    assert file["bytes"] == (tmp_path / "a.jsonl").stat().st_size
    assert len(file["sha256"]) == 64


def test_refusals(tmp_path):
    empty = recipe_of(write_jsonl(tmp_path / "empty.jsonl", ["", " "]))
    with pytest.raises(DataError, match=r"recipe 'empty': no document is left of 2 \(2 empty\)"):
        build(empty, tmp_path / "a", workers=1)
    with pytest.raises(DataError, match="no such file"):
        build(recipe_of(tmp_path / "missing.jsonl"), tmp_path / "a", workers=1)
    good = recipe_of(write_jsonl(tmp_path / "good.jsonl", sentences(9)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    with pytest.raises(DataError, match="exists and is not a token store"):
        build(good, tmp_path / "full", workers=1)
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep me"
    first = build(good, tmp_path / "out", workers=1)
    assert build(good, tmp_path / "out", workers=1).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="holds a store of another recipe"):
        build(dataclasses.replace(good, validation=0.5), tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="has no sources"):
        dataclasses.replace(good, sources=())
    with pytest.raises(DataError, match="expected a fraction"):
        dataclasses.replace(good, validation=1.0)
    with pytest.raises(DataError, match=f"multiple of {CHUNK}"):
        build(good, tmp_path / "b", workers=1, shard=1000)


def test_two_builds_of_one_store_do_not_mix(tmp_path):
    recipe = recipe_of(write_jsonl(tmp_path / "a.jsonl", sentences(9)))
    code = (
        "import sys, time, pathlib\nfrom slmjax.lock import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), ValueError):\n    print('held', flush=True)\n    time.sleep(100)"
    )
    at = tmp_path / "out.building" / "lock"
    with subprocess.Popen([sys.executable, "-c", code, at], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"process {other.pid} on .* is building there"):
            build(recipe, tmp_path / "out", workers=1)
        other.kill()
        other.wait()
    build(recipe, tmp_path / "out", workers=1)


def test_a_malformed_line_stops_a_build_and_after_the_repair_it_goes_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(30))
    good = path.read_text()
    path.write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"a.jsonl:31: not JSON"):
        build(recipe_of(path), tmp_path / "out", workers=1)
    path.write_text(good)
    assert build(recipe_of(path), tmp_path / "out", workers=1).manifest["documents"]["kept"] == 30


def test_recipe_files(tmp_path):
    path = tmp_path / "r.py"
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(path)
    path.write_text("x = 1")
    with pytest.raises(UserError, match=r"has no function recipe\(\)"):
        load_recipe(path)
    path.write_text("def recipe(): return 3")
    with pytest.raises(UserError, match="returned int, expected Recipe"):
        load_recipe(path)


def test_recipes_are_built_once_into_the_cache(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", sentences(50))
    (tmp_path / "recipe.py").write_text(RECIPE_FILE)
    first = open_source(str(tmp_path / "recipe.py"), tmp_path / "cache")
    second = open_source(load_recipe(tmp_path / "recipe.py"), tmp_path / "cache")
    assert first.location == second.location
    assert first.name == "killed"
    time.sleep(0.01)
    write_jsonl(tmp_path / "corpus.jsonl", sentences(60))
    assert open_source(str(tmp_path / "recipe.py"), tmp_path / "cache").location != first.location


def test_a_base_class_is_not_a_source(tmp_path):
    recipe = Recipe(name="x", sources=(Source(licence="x"),), tokenizer=TokenizerSpec())
    with pytest.raises(TypeError, match="Source is not a source: use Text"):
        recipe.files()


def test_another_tokenizer_file_is_another_build(tmp_path):
    """A store never goes on with the ids of a tokenizer.json that has been replaced."""
    corpus = write_jsonl(tmp_path / "a.jsonl", sentences(40))
    small, large = (BPE(vocab=n).make(sentences(40), tmp_path) for n in (270, 290))
    small.save(tmp_path / "given")
    recipe = recipe_of(corpus, tokenizer=File(path=str(tmp_path / "given")))
    assert build(recipe, tmp_path / "out", workers=1).vocab == small.vocab
    cached = open_source(recipe, tmp_path / "cache")
    assert build(recipe, tmp_path / "out", workers=1).vocab == small.vocab  # done already
    large.save(tmp_path / "given")
    with pytest.raises(DataError, match="another recipe"):
        build(recipe, tmp_path / "out", workers=1)
    again = open_source(recipe, tmp_path / "cache")
    assert (cached.vocab, again.vocab) == (small.vocab, large.vocab)


def test_documents_begin_as_the_tokenizer_file_says(tmp_path):
    """A chat tokenizer names a BOS for its template and adds none to text."""
    corpus = write_jsonl(tmp_path / "a.jsonl", sentences(40))
    BPE(vocab=270).make(sentences(40), tmp_path).save(tmp_path / "given")
    file = tmp_path / "given" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False, "chat_template": "x"}))
    store = build(recipe_of(corpus, tokenizer=File(path=str(tmp_path / "given"))), tmp_path / "out", workers=1)
    given = Tokenizer.load(tmp_path / "given")
    assert given.bos_id is None
    assert store.tokenizer().fingerprint == given.fingerprint


def test_a_missing_tokenizer_is_found_before_the_work(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", sentences(5))
    recipe = recipe_of(corpus, tokenizer=File(path=str(tmp_path / "none.json")))
    with pytest.raises(DataError, match=r"none.json: no such tokenizer"):
        build(recipe, tmp_path / "out", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "a.jsonl", sentences(5))
    with pytest.raises(DataError, match=r"texts: a folder; name its files with a glob, such as .*texts/\*"):
        build(recipe_of(tmp_path / "texts"), tmp_path / "out", workers=1)
