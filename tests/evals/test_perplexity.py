"""Loss, perplexity and bits per byte: weight-exact, and with errors that cover at the stated rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from slmjax.errors import DataError
from slmjax.estimate import ratio
from slmjax.evals.perplexity import evaluate, summarise
from slmjax.models.families.llama import llama
from slmjax.types import Batch

pytestmark = pytest.mark.fast

DECODER = llama(layers=2, width=16, heads=2, kv_heads=1, hidden=24, vocab=50, context=32)


def batches(count: int, rows: int = 3, length: int = 12) -> list[Batch]:
    """Uneven weights, two documents a row, and one row of padding only."""
    out = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50, (rows, length + 1)).astype(np.int32)
        weights = rng.choice([0.0, 1.0, 0.5], (rows, length)).astype(np.float32)
        weights[-1] = 0 if seed == 0 else weights[-1]
        segments = np.repeat([[1, 2]], length // 2, axis=1).repeat(rows, axis=0).astype(np.int32)
        positions = np.tile(np.arange(length // 2), (rows, 2)).astype(np.int32)
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments))
    return out


def test_every_figure_against_float64_numpy():
    model, params = DECODER.build(), DECODER.build().init(jax.random.key(0))
    sizes = np.random.default_rng(9).integers(0, 6, 47)  # the table has 3 rows more than the tokenizer
    data = batches(3)
    result = evaluate(model, params, iter(data), token_bytes=sizes.tolist())
    nats, weight, size = [], [], []
    for b in data:
        hidden = model.apply(params, *map(jnp.asarray, (b.tokens, b.positions, b.segment_ids))).hidden
        logits = np.asarray(model.unembed(params, hidden), np.float64)
        nll = -np.take_along_axis(log_softmax(logits, axis=-1), b.targets[..., None], axis=-1)[..., 0]
        known = np.append(sizes, [0, 0, 0])[b.targets]
        nats += list((nll * b.weights).sum(1))
        weight += list(b.weights.sum(1))
        size += list((known * b.weights).sum(1))
    loss = sum(nats) / sum(weight)
    assert result.loss.value == pytest.approx(loss, rel=1e-6)
    assert result.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.bits_per_byte.value == pytest.approx(sum(nats) / math.log(2) / sum(size), rel=1e-6)
    assert result.tokens == sum(weight)
    assert result.bytes == sum(size)
    assert result.sequences == 8
    assert result.perplexity.se == pytest.approx(result.perplexity.value * result.loss.se)


def test_how_rows_are_batched_does_not_matter():
    model, params = DECODER.build(), DECODER.build().init(jax.random.key(0))
    data = batches(4)
    one = jax.tree.map(lambda *x: np.concatenate(x), *data)
    a, b = (evaluate(model, params, d, token_bytes=[1] * 50) for d in (data, [one]))
    np.testing.assert_allclose([*a.loss, *a.bits_per_byte], [*b.loss, *b.bits_per_byte], rtol=1e-5)
    assert (a.tokens, a.bytes, a.sequences) == (b.tokens, b.bytes, b.sequences)


def test_one_compilation_serves_all_batches():
    model, params = DECODER.build(), DECODER.build().init(jax.random.key(0))
    traces = []
    counted = model._replace(apply=lambda *a, **k: traces.append(1) or model.apply(*a, **k))
    evaluate(counted, params, batches(5))
    assert len(traces) == 1


def test_standard_errors_cover():
    """Correlated tokens inside rows of uneven length: the clustered error is right where the naive one is not."""
    rng = np.random.default_rng(0)
    rows, trials, inside, naive_inside = 120, 600, 0, 0
    for _ in range(trials):
        weight = rng.integers(5, 60, rows).astype(float)
        level = 3 + rng.standard_normal(rows)  # shared by all tokens of a row
        nats = weight * level + np.sqrt(weight) * rng.standard_normal(rows)
        estimate = ratio(nats, weight)
        naive = math.sqrt((1 + 1) / weight.sum())
        inside += abs(estimate.value - 3) < 1.96 * estimate.se
        naive_inside += abs(estimate.value - 3) < 1.96 * naive
    assert 0.92 < inside / trials < 0.975
    assert naive_inside / trials < 0.6


def test_delta_method_and_bytes():
    """Equal rows have no spread; doubling the bytes halves the bits a byte and its error."""
    rows = np.array([[6.0, 3, 9], [6, 3, 9], [6, 3, 9]])
    assert summarise(rows).loss == (2.0, 0.0)
    rng = np.random.default_rng(1)
    rows = np.stack([rng.normal(30, 3, 50), np.full(50, 10.0), np.full(50, 40.0)], axis=1)
    result = summarise(rows)
    assert result.loss.se == pytest.approx(np.std(rows[:, 0] / 10, ddof=1) / math.sqrt(50))
    doubled = summarise(rows * [1, 1, 2])
    assert doubled.bits_per_byte.value == pytest.approx(result.bits_per_byte.value / 2)
    assert doubled.bits_per_byte.se == pytest.approx(result.bits_per_byte.se / 2)
    assert summarise(rows * [1, 1, 0]).bits_per_byte is None
    assert math.isnan(summarise(rows[:1]).loss.se)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(DataError, match="no batch holds a token"):
        summarise(np.zeros((4, 3)))
    with pytest.raises(DataError, match="no batch holds a token"):
        evaluate(DECODER.build(), {}, [])
