"""Order, resume, hosts and epochs: nothing repeated, nothing dropped, and a batch is what its documents say."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmjax.data.loader import Loader, ReadProcesses, check_tokenizers, open_stores, shuffled, validation_batches
from slmjax.data.packing import BestFit, Concatenate
from slmjax.data.rows import Rows, assemble
from slmjax.data.spec import PackedText, Part
from slmjax.data.weighting import AfterToken, EveryToken, Weighting
from slmjax.errors import DataError
from slmjax.types import Batch

pytestmark = pytest.mark.fast

LENGTH = 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def data(*weights, **fields):
    parts = tuple(Part(source="unused", weight=w) for w in weights or (1.0,))
    return PackedText(**({"train": parts, "length": LENGTH, "batch": 8} | fields))


def take(loader, n):
    return [next(loader) for _ in range(n)]


def fields(batch):
    """The five arrays [B, T] of a batch; packed text has no others."""
    *found, extra = batch
    assert not extra
    return found


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all((x == y).all() for one, two in pairs for x, y in zip(fields(one), fields(two), strict=True))


def joined(parts):
    """The parts of the hosts as one batch."""
    return Batch(*(np.concatenate(arrays) for arrays in zip(*map(fields, parts), strict=True)))


@pytest.mark.parametrize("packing", [BestFit(), Concatenate(), Concatenate(cross_document=True)])
def test_batches_say_what_the_documents_say(store, cache, packing):
    """Every (token, next token) pair of every document is learned exactly once, and no other pair is."""
    rows = Rows(store, "train", packing, LENGTH, cache)
    batch = assemble([(rows, r) for r in range(rows.count)], LENGTH)
    offsets = np.concatenate([next(store.offsets("train"))])
    tokens = store.tokens("train")[0 : offsets[-1]]
    cross = packing == Concatenate(cross_document=True)
    learned = sorted(zip(batch.tokens[batch.weights == 1], batch.targets[batch.weights == 1], strict=True))
    follows = np.ones(len(tokens) - 1, bool)
    if not cross:
        follows[offsets[1:-1] - 1] = False
    assert learned == sorted(zip(tokens[:-1][follows], tokens[1:][follows], strict=True))
    assert np.isin(batch.weights, [0, 1]).all()
    assert [a.dtype for a in fields(batch)] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    for i in range(rows.count):
        ids, positions = batch.segment_ids[i], batch.positions[i]
        used = int((ids > 0).sum())
        assert (ids[used:] == 0).all()
        assert (batch.weights[i, used:] == 0).all()
        steps = np.diff(ids[:used])
        assert ids[0] == 1
        assert np.isin(steps, [0, 1]).all()
        assert (positions[:used][np.append(True, steps == 1)] == 0).all()
        assert (np.diff(positions[:used])[steps == 0] == 1).all()
        if not cross:  # a segment is of one document: BOS only first, EOS only last
            starts = np.append(True, steps == 1)
            assert not (batch.tokens[i, :used][~starts] == 256).any()
            assert not (batch.tokens[i, :used][~np.append(starts[1:], True)] == 257).any()
        else:
            assert (ids == 1).all() or i == rows.count - 1


def test_only_what_follows_a_marker_counts(store, cache):
    """Against a count document by document: byte 46, a full stop, is the marker."""
    packing, marker = Concatenate(), 46
    rows = Rows(store, "train", packing, LENGTH, cache)
    every = [(rows, r) for r in range(rows.count)]
    whole, after = assemble(every, LENGTH), assemble(every, LENGTH, weighting=AfterToken(token=marker))
    assert same([whole], [assemble(every, LENGTH, weighting=EveryToken())])
    expected = np.zeros_like(whole.weights)
    for i in range(rows.count):
        for segment in range(1, int(whole.segment_ids[i].max()) + 1):
            at = np.flatnonzero(whole.segment_ids[i] == segment)
            seen = np.flatnonzero(whole.tokens[i][at] == marker)
            if len(seen):
                expected[i, at[seen[0]] :][: len(at) - seen[0]] = whole.weights[i, at[seen[0] :]]
    assert (after.weights == expected).all()
    assert 0 < expected.sum() < whole.weights.sum()
    batches = take(Loader(data(packing=packing, weighting=AfterToken(token=marker)), [store], cache=cache), 2)
    plain = take(Loader(data(packing=packing), [store], cache=cache), 2)
    assert all((a.tokens == b.tokens).all() for a, b in zip(batches, plain, strict=True))
    assert sum(b.weights.sum() for b in batches) < sum(b.weights.sum() for b in plain)
    with pytest.raises(DataError, match=r"data.weighting.token is -1"):
        AfterToken(token=-1)
    with pytest.raises(TypeError, match="use EveryToken or AfterToken"):
        Weighting()(*[np.zeros((1, 2), np.int32)] * 4)


def test_an_epoch_is_a_permutation_and_the_next_another(store, cache):
    loader = Loader(data(batch=4), [store], cache=cache)
    (count,) = loader.sequences
    rows = [r.tobytes() for b in take(loader, 2 * count // 4 + 1) for r in b.tokens]
    first, second = rows[:count], rows[count : 2 * count]
    every = [r.tobytes() for r in assemble([(loader._parts[0], r) for r in range(count)], LENGTH).tokens]
    assert sorted(first) == sorted(second) == sorted(every)
    assert first != second
    assert first != every
    assert loader.epochs()[0] == loader.state()["epoch"] == loader.state()["next"] / count


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_the_shuffle_is_a_permutation(size, seed):
    assert sorted(shuffled(i, size, (seed,)) for i in range(size)) == list(range(size))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 150))
def test_resume_at_any_point_equals_uninterrupted(store, other, cache, before):
    spec = data(3.0, 1.0, batch=4)
    whole = Loader(spec, [store, other], cache=cache)
    take(whole, before)
    state = json.loads(json.dumps(whole.state()))
    resumed = Loader(spec, [store, other], cache=cache)
    resumed.restore(state)
    assert same(take(whole, 3), take(resumed, 3))
    assert whole.state() == resumed.state()


def test_going_back(store, cache):
    loader = Loader(data(), [store], cache=cache)
    state = loader.state()
    first = take(loader, 3)
    loader.restore(state)
    assert same(first, take(loader, 3))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_share_each_global_batch(store, cache, hosts):
    whole = take(Loader(data(), [store], cache=cache), 5)
    parts = [take(Loader(data(), [store], host=h, hosts=hosts, cache=cache), 5) for h in range(hosts)]
    for i, expected in enumerate(whole):
        assert same([joined([p[i] for p in parts])], [expected])


def test_another_number_of_hosts_goes_on_without_repeating_or_dropping(store, cache):
    spec = data()
    expected = take(Loader(spec, [store], cache=cache), 12)
    got, state = [], None
    for hosts in (1, 2, 4, 1):
        loaders = [Loader(spec, [store], host=h, hosts=hosts, cache=cache) for h in range(hosts)]
        for loader in loaders:
            if state:
                loader.restore(state)
        batches = [take(loader, 3) for loader in loaders]
        got += [joined([b[i] for b in batches]) for i in range(3)]
        states = [loader.state() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert same(got, expected)


def test_another_batch_size_goes_on_at_the_same_sequence(store, cache):
    first = Loader(data(batch=8), [store], cache=cache)
    rows = np.concatenate([b.tokens for b in take(first, 4)])
    second = Loader(data(batch=8), [store], cache=cache)
    take(second, 2)
    third = Loader(data(batch=4), [store], cache=cache)
    third.restore(second.state())
    assert (np.concatenate([b.tokens for b in take(third, 4)]) == rows[16:]).all()


def test_processes_read_what_threads_read(store, other, cache):
    spec = data(2.0, 1.0)
    expected = take(Loader(spec, [store, other], cache=cache), 6)
    loader = Loader(spec, [store, other], prefetch=ReadProcesses(count=2, batches=1), cache=cache)
    got = take(loader, 4)
    three = Loader(spec, [store, other], prefetch=ReadProcesses(count=1, batches=1), cache=cache)
    three.restore(loader.state())
    loader.close()
    got += take(three, 2)
    three.close()
    assert same(got, expected)


def test_mixture_proportions_and_epochs(store, other, cache):
    loader = Loader(data(3.0, 1.0, batch=8), [store, other], cache=cache)
    own = [{r.tobytes() for r in _all(part)} for part in loader._parts]
    rows = [r.tobytes() for b in take(loader, 20) for r in b.tokens]
    assert [sum(r in part for r in rows) for part in own] == [120, 40]
    assert loader.epochs() == (120 / loader.sequences[0], 40 / loader.sequences[1])


def _all(part):
    return assemble([(part, r) for r in range(part.count)], LENGTH).tokens


def test_validation_is_fixed_and_each_sequence_comes_once(store, other, cache):
    spec = data(1.0, 1.0, seed=5)
    batches = list(validation_batches(spec, [store, other], cache=cache))
    again = list(validation_batches(data(1.0, 1.0, seed=9), [store, other], cache=cache))
    assert same(batches, again)
    rows = np.concatenate([b.tokens for b in batches])
    filled = np.concatenate([b.segment_ids for b in batches])[:, 0] > 0
    parts = [Rows(s, "validation", spec.packing, LENGTH, cache) for s in (store, other)]
    expected = [r.tobytes() for part in parts for r in _all(part)]
    assert sorted(r.tobytes() for r in rows[filled]) == sorted(expected)
    assert len(rows) % 8 == 0
    assert not np.concatenate([b.weights for b in batches])[~filled].any()
    few = list(validation_batches(spec, [store, other], 2, cache=cache))
    assert same(few, batches[:2])


def test_validation_is_split_over_hosts(store, cache):
    whole = list(validation_batches(data(), [store], 3, cache=cache))
    halves = [list(validation_batches(data(), [store], 3, host=h, hosts=2, cache=cache)) for h in range(2)]
    assert same([joined([h[i] for h in halves]) for i in range(3)], whole)


def test_refusals(store, other, bpe_store, cache):
    with pytest.raises(DataError, match=r"data.batch is 8; it must be a multiple of the number of hosts, 3"):
        Loader(data(), [store], hosts=3, cache=cache)
    with pytest.raises(DataError, match="bpe and store were written by different tokenizers"):
        Loader(data(1.0, 1.0), [store, bpe_store], cache=cache)
    with pytest.raises(DataError, match="different tokenizers"):
        check_tokenizers([store, other, bpe_store])
    state = Loader(data(), [store], cache=cache).state()
    for spec, stores, name in (
        (data(seed=1), [store], "seed"),
        (data(length=32), [store], "length"),
        (data(packing=Concatenate()), [store], "packing"),
        (data(), [other], "stores"),
        (data(1.0, 1.0), [store, other], "stores"),
    ):
        with pytest.raises(DataError, match=f"data of the checkpoint differs in {name}"):
            Loader(spec, stores, cache=cache).restore(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 1}, r"data.length is 1; expected 2 to"),
        ({"length": 1 << 30}, r"data.length is 1073741824"),
        ({"batch": 0}, r"data.batch is 0"),
        ({"train": ()}, r"data.train is empty"),
        ({"seed": -1}, r"data.seed is -1"),
    ],
)
def test_data_that_makes_no_sense(fields, message):
    with pytest.raises(DataError, match=message):
        data(**fields)
    with pytest.raises(DataError, match=r"Part.weight is -2.0"):
        Part(source="x", weight=-2.0)


def test_what_a_run_needs_of_opened_data(store, other, bpe_store, tmp_path):
    places = (Part(source=store.location, weight=3.0), Part(source=other.location))
    spec = PackedText(train=places, validation=(Part(source=other.location),), length=LENGTH, batch=8)
    opened = spec.open(cache=tmp_path)
    assert [(s.split, s.share, s.fingerprint) for s in opened.stores] == [
        ("train", 0.75, store.fingerprint),
        ("train", 0.25, other.fingerprint),
        ("validation", None, other.fingerprint),
    ]
    assert opened.stores[0].sources[0]["licence"] == store.manifest["sources"][0]["licence"]
    assert (opened.vocab, opened.labels, opened.has_validation) == (258, (), True)
    stream = opened.training()
    assert same(take(stream, 2), take(Loader(spec, [store, other], cache=tmp_path), 2))
    tokens = store.count("train", "tokens") + other.count("train", "tokens")
    assert 0.9 * 16 * LENGTH / tokens < opened.epochs(16) < 16 * LENGTH / tokens, "padding does not count"
    assert "source" not in str(spec.identity())
    listed = [dataclasses.asdict(s) for s in opened.stores]
    again = dataclasses.replace(spec, batch=4).reopen(listed, cache=tmp_path)
    assert [s.fingerprint for s in again.stores if s.split == "validation"] == [other.fingerprint]
    assert same(again.validation(2), dataclasses.replace(spec, batch=4).open(cache=tmp_path).validation(2))
    elsewhere = spec.elsewhere(bpe_store.location, tmp_path).open(cache=tmp_path)
    assert elsewhere.name == "bpe"
    shapes = [a.shape for a in fields(spec.empty(3))]
    assert shapes == [(3, LENGTH)] * 5


def test_stores_are_opened_by_path(store, tmp_path):
    opened = open_stores([Part(source=store.location)], cache=tmp_path)
    assert [s.fingerprint for s in opened] == [store.fingerprint]


def test_epochs_are_counted_in_tokens_and_not_in_padding(store, other, cache):
    """Where every row is half empty an epoch takes no more sequences than there are rows; of a mixture, a sequence is
    as much of an epoch as it holds tokens."""
    from slmjax.data.loader import OpenedText

    for stores in ((store,), (store, other)):
        spec = data(*((3.0, 1.0)[: len(stores)]))
        loader = Loader(spec, stores, cache=cache)
        opened = OpenedText(spec, stores, stores, cache)
        for _ in range(5):
            next(loader)
        assert loader.state()["epoch"] == pytest.approx(opened.epochs(5 * spec.batch), rel=1e-12)
        held = [s.count("train", "tokens") / n for s, n in zip(stores, loader.sequences, strict=True)]
        shares = [1.0] if len(stores) == 1 else [0.75, 0.25]
        tokens = 1000 * sum(share * each for share, each in zip(shares, held, strict=True))
        assert opened.epochs(1000) == pytest.approx(tokens / sum(s.count("train", "tokens") for s in stores))
    assert OpenedText(data(), (store,), (store,), cache).epochs(Loader(data(), (store,), cache=cache).sequences[0]) == 1
