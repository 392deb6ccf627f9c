"""Classify: against plain arithmetic, over micro-batches and padding, for encoders and decoders; and who may use it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import Experiment
from slmjax.data.labelled import LabelledText
from slmjax.data.spec import PackedText, Part
from slmjax.errors import DataError, UserError
from slmjax.evals.classification import classify as measure
from slmjax.evals.classification import wilson
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.nn.heads import Classifier, LastTokenScore
from slmjax.objectives import Classify, MaskedLM, NextToken
from slmjax.optim.schedules import Cosine
from slmjax.runs.loading import generative
from slmjax.train.micro import accumulated
from slmjax.types import Batch, first_token, last_token

pytestmark = pytest.mark.fast

LABELS = ("bad", "fair", "good")
ENCODER = bert(layers=1, width=16, heads=2, hidden=24, vocab=40, context=16, head=Classifier(labels=LABELS))
DECODER = dataclasses.replace(
    llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=40, context=16, tied=False),
    head=LastTokenScore(labels=LABELS),
)
MODELS = pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])


def batch(rows=8, length=12, padding=2, seed=0):
    """Texts of unequal lengths; the last `padding` rows are padding."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    lengths[rows - padding :] = 0
    real = np.arange(length) < lengths[:, None]
    return Batch(
        tokens=jnp.asarray(np.where(real, rng.integers(2, 40, (rows, length)), 0), jnp.int32),
        targets=jnp.zeros((rows, length), jnp.int32),
        weights=jnp.asarray((np.arange(length) == 0) & real, jnp.float32),
        positions=jnp.asarray(np.where(real, np.arange(length), 0), jnp.int32),
        segment_ids=jnp.asarray(real, jnp.int32),
        extra={"labels": jnp.asarray(np.where(lengths > 0, rng.integers(0, 3, rows), 0), jnp.int32)},
    )


def built(model):
    made = model.build(Compute(dtype="float32"))
    params = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), made.init(jax.random.key(0))
    )
    return made, params


@MODELS
def test_loss_and_accuracy_by_hand(model):
    """Text by text, alone and without padding."""
    made, params = built(model)
    b = batch()
    loss, metrics = Classify().build(made).loss(params, (), b, None)
    nats, right = [], []
    for i in range(6):
        n = int(b.segment_ids[i].sum())
        one = [x[i : i + 1, :n] for x in (b.tokens, b.positions, b.segment_ids)]
        hidden = made.apply(params, *one).hidden
        at = 0 if model is ENCODER else n - 1
        logits = np.asarray(made.unembed(params, hidden[0, at]), np.float64)
        label = int(b.extra["labels"][i])
        nats.append(np.log(np.exp(logits).sum()) - logits[label])
        right.append(logits.argmax() == label)
    assert float(loss) == pytest.approx(np.mean(nats), rel=1e-5)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {"loss": np.mean(nats), "accuracy": np.mean(right), "weight": 6.0}, rel=1e-5
    )
    found = measure(made, params, [b])
    assert found.texts == 6
    assert found.loss.value == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.loss.se == pytest.approx(np.std(nats, ddof=1) / 6**0.5, rel=1e-4)
    assert found.accuracy.value == np.mean(right)


@MODELS
@pytest.mark.parametrize("n", [2, 4])
def test_micro_batches_change_no_gradient(model, n):
    """The texts of a batch fall unevenly into its pieces, one of which may be padding alone."""
    made, params = built(model)
    objective = Classify().build(made)

    def f(params, batch, key):
        (_, metrics), grads = jax.value_and_grad(lambda p: objective.loss(p, (), batch, key), has_aux=True)(params)
        return metrics, grads

    key = jax.random.key(0)
    whole, parts = (accumulated(f, params, batch(padding=5), key, pieces) for pieces in (1, n))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    nothing, _ = accumulated(f, params, batch(padding=8), key, n)
    assert {k: float(v) for k, v in nothing.items()} == {"loss": 0.0, "accuracy": 0.0, "weight": 0.0}


def test_where_a_text_is_read():
    segments = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert last_token(segments).tolist() == [1, 3, 0]
    assert first_token(segments).tolist() == [0, 0, 0]


def test_a_head_takes_the_place_of_the_output_table():
    assert "unembed/table" not in DECODER.paths()
    assert "head/score" in DECODER.paths()
    plain = dataclasses.replace(DECODER, head=None)
    mine, theirs = (d.build().init(jax.random.key(3)) for d in (DECODER, plain))
    for name in ("embed", "layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, mine[name], theirs[name])
    assert (DECODER.labels, DECODER.predicts_tokens, plain.labels, plain.predicts_tokens) == (LABELS, False, (), True)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes, n, low, high):
    """Table I of Newcombe 1998, Statistics in Medicine 17:857-872, method 3."""
    found = wilson(successes, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == successes / n
    with pytest.raises(DataError, match="no labelled text"):
        wilson(0, 0)


def test_what_belongs_together():
    packed = PackedText(train=(Part(source="store"),), length=16, batch=2)
    labelled = LabelledText(train=("x.csv",), length=16, batch=2)
    opened = dataclasses.replace(labelled, closed=False)
    words = bert(layers=1, width=16, heads=2, hidden=24, vocab=40, context=16)
    base = {"name": "x", "schedule": Cosine(peak_lr=1e-3), "steps": 20}
    for model, data, objective, message in (
        (ENCODER, packed, Classify(), "objective is Classify, but data is PackedText"),
        (DECODER, opened, NextToken(), "objective is NextToken, but model.head predicts no tokens"),
        (
            dataclasses.replace(DECODER, head=None),
            opened,
            NextToken(),
            "is LabelledText, which has no next tokens",
        ),
        (words, labelled, Classify(), "the model scores no labels"),
        (ENCODER, opened, Classify(), "data.closed is False, but an encoder reads .*set data.closed=True"),
        (DECODER, labelled, Classify(), "data.closed is True, but a decoder .*set data.closed=False"),
        (ENCODER, labelled, MaskedLM(), "predicts no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            Experiment(model=model, data=data, objective=objective, **base)
    for model, data, objective in (
        (ENCODER, labelled, Classify()), (DECODER, opened, Classify()), (words, labelled, MaskedLM())
    ):  # fmt: skip
        Experiment(model=model, data=data, objective=objective, **base)
    with pytest.raises(UserError, match=r"this model is a classifier \(bad, fair, good\): it labels texts"):
        generative(DECODER)
