"""Proportions, and that a position alone says where a sequence comes from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data import mixture
from slmjax.errors import DataError

pytestmark = pytest.mark.fast

weights_st = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(weights_st, st.integers(0, 10**15))
def test_each_part_has_given_its_share_after_any_number(weights, n):
    counts = mixture.drawn(mixture.shares(weights), n)
    assert sum(counts) == n
    expected = np.array(weights) / sum(weights) * n
    assert (abs(np.array(counts) - expected) <= len(weights) + n * 1e-3).all()


@settings(max_examples=50, deadline=None)
@given(weights_st, st.integers(0, 10**12))
def test_locate_counts_what_came_before(weights, start):
    parts = mixture.shares(weights)
    for n in range(start, start + 50):
        part, before = mixture.locate(parts, n)
        counts, after = mixture.drawn(parts, n), mixture.drawn(parts, n + 1)
        assert before == counts[part]
        counts[part] += 1
        assert after == counts


def test_a_small_mixture_by_hand():
    parts = mixture.shares([3.0, 1.0])
    assert [mixture.locate(parts, n)[0] for n in range(8)] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert mixture.drawn(parts, 400) == [300, 100]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [1e-9]])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(DataError, match="weights of a mixture"):
        mixture.shares(weights)
