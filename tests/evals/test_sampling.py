"""Sampling rules against transformers' own processors, closed forms, and the frequencies of many draws."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.client import reference_python
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from scipy.stats import chisquare

from slmjax.errors import UserError
from slmjax.evals.sampling import GREEDY, MinP, RepetitionPenalty, Temperature, TopK, TopP, sampler

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_beyond_vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.3},
    "repetition_below_1": {"repetition_penalty": 0.8},
    "all": {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "order": {"temperature": 2.5, "top_k": 7, "top_p": 0.6},
}


def seen_in(ids: np.ndarray, vocab: int) -> np.ndarray:
    seen = np.zeros((len(ids), vocab), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return seen


def test_processed_logits_equal_transformers(tmp_path):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((6, 97))).astype(np.float32)
    ids = rng.integers(0, 97, (6, 11)).astype(np.int32)
    save_file({"logits": logits, "input_ids": ids}, tmp_path / "in.safetensors")
    script = pathlib.Path(__file__).with_name("reference_sampling.py")
    subprocess.run(
        [reference_python(), script, tmp_path / "in.safetensors", tmp_path / "out.safetensors", json.dumps(CASES)],
        check=True,
    )
    theirs = load_file(tmp_path / "out.safetensors")
    for name, fields in CASES.items():
        ours = np.asarray(sampler(**fields).logits(jnp.asarray(logits), jnp.asarray(seen_in(ids, 97))))
        assert (np.isneginf(ours) == np.isneginf(theirs[name])).all(), name
        np.testing.assert_allclose(ours, theirs[name], rtol=1e-6, atol=0, err_msg=name)
    assert not np.isneginf(theirs["plain"]).any()
    assert np.isneginf(theirs["all"]).any()


@pytest.mark.fast
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.999), st.integers(1, 40))
def test_restrictions_keep_the_most_likely(seed, p, k):
    """Each keeps a set closed upwards, never empty, of the size that its definition asks for."""
    logits = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32) * 4
    unseen = jnp.zeros(logits.shape, bool)
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    for rule in (TopK(k), TopP(p), MinP(p)):
        kept = ~np.isneginf(np.asarray(rule(jnp.asarray(logits), unseen)))
        for row in range(3):
            inside, outside = probabilities[row][kept[row]], probabilities[row][~kept[row]]
            assert inside.size > 0
            assert outside.size == 0 or inside.min() > outside.max()
            if isinstance(rule, TopK):
                assert inside.size == k
            if isinstance(rule, TopP):
                assert inside.sum() >= p - 1e-5
                assert inside.sum() - inside.min() < p + 1e-5
            if isinstance(rule, MinP):
                assert inside.min() >= p * inside.max() * (1 - 1e-5)
                assert outside.size == 0 or outside.max() <= p * inside.max() * (1 + 1e-5)


@pytest.mark.fast
def test_ties_survive_together():
    logits = jnp.asarray([[2.0, 2.0, 2.0, 0.0]])
    unseen = jnp.zeros((1, 4), bool)
    for rule in (TopK(1), TopP(0.1)):
        assert np.isneginf(np.asarray(rule(logits, unseen))).tolist() == [[False, False, False, True]]


@pytest.mark.fast
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, CASES["all"]]
)
def test_frequencies_follow_the_processed_distribution(fields):
    draws = 20_000
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32) * 1.5
    seen = np.arange(12) % 3 == 0
    choose = sampler(**fields)
    wide = (jnp.broadcast_to(logits, (draws, 12)), jnp.broadcast_to(seen, (draws, 12)))
    tokens = np.asarray(choose(jax.random.split(jax.random.key(3), draws), *wide))
    expected = softmax(np.asarray(choose.logits(*(x[:1] for x in wide)), np.float64)[0])
    counts = np.bincount(tokens, minlength=12)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert chisquare(counts[possible], expected[possible] * draws).pvalue > 1e-3


@pytest.mark.fast
def test_temperature_zero_is_greedy_and_still_penalises():
    logits = jnp.asarray([[1.0, 3.0, 2.0]])
    nothing, second = jnp.zeros((1, 3), bool), jnp.asarray([[False, True, False]])
    assert sampler(temperature=0.0, top_k=3) == GREEDY
    keys = jax.random.split(jax.random.key(0), 1)
    assert sampler(temperature=0.0, repetition_penalty=2.0)(keys, logits, nothing).tolist() == [1]
    assert sampler(temperature=0.0, repetition_penalty=2.0)(keys, logits, second).tolist() == [2]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_values_out_of_range_are_named(fields, name):
    with pytest.raises(UserError, match=rf"^{name} is .*expected"):
        sampler(**fields)


@pytest.mark.fast
def test_order_is_that_of_transformers():
    rules = sampler(**CASES["all"]).rules
    assert [type(r) for r in rules] == [RepetitionPenalty, Temperature, TopK, TopP, MinP]
