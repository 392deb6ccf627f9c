"""Every token once, in order, no row longer than it may be, and best fit against a plain implementation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data.packing import BestFit, Concatenate, best_fit_decreasing, plan

pytestmark = pytest.mark.fast

lengths_st = st.lists(st.integers(1, 40), min_size=1, max_size=60)
packings = st.sampled_from([BestFit(), Concatenate(), Concatenate(cross_document=True)])


def offsets_of(lengths, blocks):
    """Document offsets in `blocks` blocks that share their borders."""
    offsets = np.cumsum([0, *lengths])
    cuts = np.linspace(0, len(lengths), blocks + 1).astype(int)
    return [offsets[a : b + 1] for a, b in itertools.pairwise(cuts) if b > a]


def rows_of(packing, lengths, length, blocks=1):
    pieces, counts = zip(*packing.blocks(offsets_of(lengths, blocks), length), strict=True)
    return np.split(np.concatenate(pieces), np.cumsum(np.concatenate(counts)))[:-1]


@settings(max_examples=200, deadline=None)
@given(lengths_st, st.integers(2, 32), packings, st.integers(1, 4))
def test_every_token_is_an_input_exactly_once(lengths, length, packing, blocks):
    rows = rows_of(packing, lengths, length, blocks)
    tokens = [t for row in rows for p in row for t in range(p["start"], p["start"] + p["length"])]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert all(1 <= sum(p["length"] for p in row) <= length for row in rows)


@settings(max_examples=200, deadline=None)
@given(lengths_st, st.integers(2, 32), st.sampled_from([BestFit(), Concatenate()]), st.integers(1, 4))
def test_no_piece_crosses_a_document(lengths, length, packing, blocks):
    offsets = np.cumsum([0, *lengths])
    for row in rows_of(packing, lengths, length, blocks):
        for p in row:
            document = np.searchsorted(offsets, p["start"], "right") - 1
            end = p["start"] + p["length"]
            assert end <= offsets[document + 1]
            assert p["ends"] == (end == offsets[document + 1])
            assert p["opens"] == 1


@settings(max_examples=100, deadline=None)
@given(lengths_st, st.integers(2, 32), st.booleans(), st.integers(1, 4))
def test_concatenate_cuts_one_stream(lengths, length, cross, blocks):
    rows = rows_of(Concatenate(cross_document=cross), lengths, length, blocks)
    for i, row in enumerate(rows):
        assert row["start"][0] == i * length
        assert (row["start"][1:] == row["start"][:-1] + row["length"][:-1]).all()
    assert all(row["length"].sum() == length for row in rows[:-1])
    if cross:
        assert all(row["opens"].tolist() == [1] + [0] * (len(row) - 1) for row in rows)
        ends = np.concatenate(rows)["ends"]
        assert ends[-1] == 1
        assert not ends[:-1].any()


@settings(max_examples=100, deadline=None)
@given(lengths_st, st.integers(2, 32))
def test_best_fit_keeps_documents_that_fit_whole(lengths, length):
    offsets = np.cumsum([0, *lengths])
    pieces = np.concatenate(rows_of(BestFit(), lengths, length))
    for document, size in enumerate(lengths):
        mine = (pieces["start"] >= offsets[document]) & (pieces["start"] < offsets[document + 1])
        assert mine.sum() == -(-size // length)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120))))
def test_best_fit_decreasing_leaves_the_room_that_the_plain_algorithm_leaves(case):
    capacity, sizes = case
    room = []
    for size in sorted(sizes, reverse=True):
        fitting = [r for r in room if r >= size]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - size)
        else:
            room.append(capacity - size)
    bins = best_fit_decreasing(np.array(sizes, np.int64), capacity)
    used = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert sorted(capacity - used) == sorted(room)


def test_a_million_documents_fill_their_rows():
    sizes = np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64).clip(1, 2048)
    bins = best_fit_decreasing(sizes, 2048)
    used = np.bincount(bins, weights=sizes)
    assert used.max() <= 2048
    assert used.sum() / (len(used) * 2048) > 0.999


def test_a_plan_is_written_once_and_read_back(tmp_path):
    lengths = [5, 9, 30, 2]
    first = plan(BestFit(), offsets_of(lengths, 1), 16, tmp_path / "plan")
    again = plan(BestFit(), [], 16, tmp_path / "plan")
    assert len(first) == len(again) == len(rows_of(BestFit(), lengths, 16))
    assert (first.pieces == again.pieces).all()
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
