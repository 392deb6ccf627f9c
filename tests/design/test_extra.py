"""Offline targets and preference pairs, each in one file: they train, and resume bit for bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from design.conftest import DATA
from running import ROOT

from slmjax.data.token_store import TokenStore
from slmjax.experiment_file import load_experiment, load_module
from slmjax.models.families.llama import llama
from slmjax.track.jsonl import read
from slmjax.train import micro
from slmjax.train.loop import CLOCK
from slmjax.types import Batch

TARGETS, PAIRS = (ROOT / "tests" / "design" / name for name in ("offline_targets.py", "preference_pairs.py"))


@pytest.mark.parametrize(("file", "own"), [(TARGETS, "SparseTargets"), (PAIRS, "Prefer(")])
def test_one_file_of_at_most_sixty_lines_that_slmjax_knows_nothing_of(file, own):
    text = file.read_text()
    assert own in text
    assert len(text.splitlines()) <= 60
    assert not [p for p in (ROOT / "slmjax").rglob("*.py") if own in p.read_text()]


@pytest.fixture(scope="module")
def bigrams(small, tmp_path_factory):
    """The 8 likeliest tokens after each token by the counts of the corpus, with their probabilities."""
    small(PAIRS, "for the store", "--steps", 1, "--schedule.warmup-steps", 0)
    (manifest,) = (DATA / "stores").glob("english_classics-*/manifest.json")
    store = TokenStore(manifest.parent)
    tokens = store.tokens("train")[0 : store.count("train", "tokens")].astype(np.int64)
    counts = np.bincount(tokens[:-1] * store.vocab + tokens[1:], minlength=store.vocab**2).reshape(store.vocab, -1)
    ids = np.argsort(-counts, axis=1)[:, :8]
    found = np.take_along_axis(counts, ids, axis=1) + 1e-6
    file = tmp_path_factory.mktemp("targets") / "bigrams.npz"
    np.savez(file, ids=np.int32(ids), probs=np.float32(found / found.sum(1, keepdims=True)))
    return file


def rows(folder):
    return [
        {k: v for k, v in row.items() if k not in (*CLOCK, "time", "elapsed")} for row in read(folder / "metrics.jsonl")
    ]


def test_a_student_learns_from_targets_on_disk_and_resumes_bit_for_bit(small, bigrams):
    arguments = ("--data.extra.targets", bigrams, "--runtime.checkpoints.every", 10)
    run = small(TARGETS, "taught", *arguments)
    whole = rows(run)
    loss = [row["loss"] for row in whole if "loss" in row]
    assert np.mean(loss[-5:]) < loss[0] - 1
    for step in ("20", "30"):
        shutil.rmtree(run / "checkpoints" / step)
    assert rows(small(TARGETS, "taught", *arguments)) == whole


def test_other_targets_are_another_experiment(bigrams, tmp_path):
    load_module(TARGETS)
    one = load_module(TARGETS).Taught(targets=str(bigrams))
    copy, other = tmp_path / "copy.npz", tmp_path / "other.npz"
    shutil.copy(bigrams, copy)
    np.savez(other, ids=np.zeros((2, 1), np.int32), probs=np.ones((2, 1), np.float32))
    same, different = (load_module(TARGETS).Taught(targets=str(f)).identity() for f in (copy, other))
    assert one.identity() == same != different


def test_pairs_train(small):
    loss = [row["loss"] for row in rows(small(PAIRS, "pairs")) if "loss" in row]
    assert loss[0] == pytest.approx(np.log(2), abs=0.1)
    assert np.mean(loss[-5:]) < loss[0] - 0.02


def test_pairs_stay_together_in_micro_batches():
    experiment, _ = load_experiment(str(PAIRS))
    model = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=31, context=16).build()
    objective, params = experiment.objective.build(model), model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens, real = rng.integers(0, 31, (4, 9), np.int32), np.arange(8) < np.array([[8], [3], [6], [0]])
    positions = np.where(real, np.arange(8), 0).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.float32(real), positions, np.int32(real))
    batch = jax.tree.map(jnp.asarray, batch._replace(extra=experiment.data.extra(batch)))

    def f(params, batch, key):
        (_, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, (), batch, key)
        return metrics, grads

    whole = f(params, batch, None)
    assert whole[0]["weight"] == 3
    for n in (2, 4):
        cut = micro.accumulated(f, params, batch, jax.random.key(0), n)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), cut, whole)
