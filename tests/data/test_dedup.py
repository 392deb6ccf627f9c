"""Duplicates, exact and near, against brute force."""

import numpy as np
import pytest
from data_corpora import sentences

from slmjax.data.dedup import Dedup, band_keys, exact_duplicates, exact_hash, near_duplicates, shingles, signature

pytestmark = pytest.mark.fast


def duplicates(texts, dedup):
    signatures = np.array([signature(t, dedup) for t in texts])
    out = np.zeros(len(texts), bool)
    return near_duplicates(signatures, band_keys(signatures, dedup), out, dedup)


def jaccard(a, b, ngram):
    a, b = set(shingles(a, ngram).tolist()), set(shingles(b, ngram).tolist())
    return len(a & b) / len(a | b)


def test_exact_duplicates_keep_the_first():
    texts = ["a", "b", "a", "c", "b", "a"]
    hashes = np.array([exact_hash(t) for t in texts], np.uint64)
    assert exact_duplicates(hashes).tolist() == [False, False, True, False, True, True]


def test_shingles_are_word_ngrams():
    assert len(shingles("a b c d e f", 5)) == 2
    assert len(shingles("a b", 5)) == 1
    assert shingles("The  Whale\nSea", 3).tolist() == shingles("the whale sea", 3).tolist()
    assert shingles("a b c", 2).tolist() != shingles("b a c", 2).tolist()
    assert len(set(shingles(" ".join(map(str, range(5000))), 5).tolist())) > 4990


def test_signatures_estimate_jaccard():
    dedup = Dedup(permutations=256)
    words = [str(i) for i in range(2000)]
    for kept in (200, 1000, 1800):
        a, b = " ".join(words), " ".join(words[:kept])
        estimate = (signature(a, dedup) == signature(b, dedup)).mean()
        assert abs(estimate - jaccard(a, b, 5)) < 0.1


def test_near_duplicates_equal_brute_force_away_from_the_threshold():
    dedup = Dedup(threshold=0.7)
    rng = np.random.default_rng(0)
    texts = []
    for i in range(60):
        words = [f"w{i}x{j}" for j in range(200)]
        texts.append(" ".join(words))
        words[rng.integers(200)] = "changed"  # 5 of 196 shingles: similarity 0.95
        texts.append(" ".join(words))
        texts.append(" ".join(words[:60]))  # similarity below 0.3
    kept, expected = [], []
    for text in texts:
        expected.append(any(jaccard(text, k, dedup.ngram) >= dedup.threshold for k in kept))
        if not expected[-1]:
            kept.append(text)
    assert duplicates(texts, dedup).tolist() == expected
    assert sum(expected) == 60


def test_what_is_out_already_makes_nothing_a_duplicate():
    dedup = Dedup()
    texts = sentences(3, longest=50)
    texts = [texts[0], texts[0], texts[1]]
    signatures = np.array([signature(t, dedup) for t in texts])
    out = np.array([True, False, False])
    assert not near_duplicates(signatures, band_keys(signatures, dedup), out, dedup).any()


def test_a_document_longer_than_one_batch_of_shingles():
    dedup = Dedup()
    words = [str(i) for i in range(20_000)]
    a, b = " ".join(words), " ".join(words[:19_500])
    assert duplicates([a, b], dedup).tolist() == [False, True]
