"""Masked language modelling: what is hidden, the loss against torch, and that it trains, resumes and is evaluated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.shapes import perturbed

from slmjax.config import Experiment
from slmjax.convert.hf import family_of, write_hf
from slmjax.convert.table import to_theirs
from slmjax.data.spec import PackedText, Part
from slmjax.errors import UserError
from slmjax.evals.perplexity import evaluate
from slmjax.losses.masked_lm import Masking, masked_lm
from slmjax.models.families.bert import bert
from slmjax.models.families.mobilebert import mobilebert, mobilebert_base
from slmjax.models.flops import flops_per_token, nonembedding_count
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.compute import Compute
from slmjax.nn.einsum_cpu import cpu_einsum
from slmjax.nn.heads import Classifier
from slmjax.objectives import MaskedLM, NextToken
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Constant
from slmjax.train.state import init_state
from slmjax.train.step import SKIP, make_evaluate, make_step
from slmjax.tree import flatten, map_with_path
from slmjax.types import Batch, Special
from slmjax.views import Identity

BERT = bert(layers=2, width=32, heads=4, hidden=48, vocab=97, context=64)
MOBILE = mobilebert(layers=2, width=32, inner=16, heads=4, hidden=24, embedding=12, vocab=97, context=64)
SPECIAL = Special(mask=3, all=(0, 1, 3))


def packed(rows=4, length=40, seed=0):
    """Rows of two documents, each [BOS] ... [EOS], and padding; the last row is all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 97, (rows, length), dtype=np.int32)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for i in range(rows - 1):
        cut, end = 9 + 5 * i, length - 3 * i
        for number, part in ((1, slice(0, cut)), (2, slice(cut, end))):
            tokens[i, part.start], tokens[i, part.stop - 1] = 0, 1
            segments[i, part] = number
            positions[i, part] = np.arange(part.stop - part.start)
        tokens[i, end:] = 0
    tokens[-1] = 0
    weights = (segments > 0).astype(np.float32)
    return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, axis=1), weights, positions, segments)))


def asked(batch, seed=0, **shares):
    return Masking(**shares)(batch, jax.random.key(seed), vocab=97, special=SPECIAL)


@pytest.mark.fast
def test_so_many_tokens_are_hidden_exactly_and_never_special_ones():
    batch = packed()
    for rate in (0.15, 0.5, 1.0):
        new = asked(batch, rate=rate)
        free = (np.asarray(batch.segment_ids) > 0) & ~np.isin(batch.tokens, SPECIAL.all)
        n = free.sum(axis=1)
        expected = np.where(n > 0, np.maximum(1, np.floor(rate * n + 0.5)), 0)
        chosen = np.asarray(new.weights) == 1
        np.testing.assert_array_equal(chosen.sum(axis=1), expected)
        assert not (chosen & ~free).any()
        np.testing.assert_array_equal(np.asarray(new.tokens)[~chosen], np.asarray(batch.tokens)[~chosen])
        np.testing.assert_array_equal(new.targets, batch.tokens)
    assert set(np.unique(np.asarray(new.weights))) == {0.0, 1.0}


@pytest.mark.fast
def test_shares_of_mask_random_and_kept_and_that_all_places_are_drawn():
    """Over 400 draws; each figure within 5 of its standard deviations."""
    batch = packed(rows=2)._replace(tokens=jnp.full((2, 40), 50), segment_ids=jnp.ones((2, 40), jnp.int32))
    tokens = np.stack([asked(batch, seed=i).tokens for i in range(400)])
    chosen = np.stack([asked(batch, seed=i).weights for i in range(400)]) == 1
    n = chosen.sum()
    assert n == 400 * 2 * 6
    masked, kept = (tokens[chosen] == 3).mean(), (tokens[chosen] == 50).mean()
    assert abs(masked - (0.8 + 0.1 / 97)) < 5 * np.sqrt(0.8 * 0.2 / n)
    assert abs(kept - (0.1 + 0.1 / 97)) < 5 * np.sqrt(0.1 * 0.9 / n)
    assert len(np.unique(tokens[chosen])) > 90
    assert np.abs(chosen.mean(axis=(0, 1)) - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 800)


@pytest.mark.fast
def test_the_key_decides():
    batch = packed()
    one, same, other = (asked(batch, seed=s) for s in (0, 0, 1))
    assert jnp.array_equal(one.tokens, same.tokens)
    assert jnp.array_equal(one.weights, same.weights)
    assert not jnp.array_equal(one.weights, other.weights)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Masking(rate=0.0), "masking.rate: 0.0"),
        (lambda: Masking(mask=0.9, random=0.2), "mask 0.9 and random 0.2"),
        (lambda: Masking()(packed(), jax.random.key(0), vocab=97, special=Special()), "no mask token"),
        (lambda: MaskedLM().build(BERT.build()).prepare(packed(), jax.random.key(0)), "objective.special is None"),
        (lambda: MaskedLM(z_loss=-1.0), "z_loss: -1.0"),
        (lambda: BERT.build().init_cache(1, 2), "is an encoder"),
        (lambda: Classifier(labels=("a", "a")), "labels: a, a"),
    ],
)
def test_mistakes_are_named(make, names):
    with pytest.raises(UserError, match=names):
        make()


@pytest.mark.parametrize("encoder", [BERT, MOBILE], ids=["bert", "mobilebert"])
def test_loss_and_gradients_are_those_of_torch(tmp_path, reference, encoder):
    """Several documents a row, of uneven length: torch is given the same masked tokens and nothing else of ours."""
    # No norm keeps MobileBERT's stream, and with it rounding, from growing: smaller matrices.
    params = perturbed(encoder) if encoder is BERT else map_with_path(_smaller, perturbed(encoder))
    write_hf(tmp_path, encoder, params)
    # Trigrams cross documents in stock MobileBERT: there, only one document a row is comparable.
    batch, key = packed() if encoder is BERT else _one_document(packed()), jax.random.key(5)
    new = Masking()(batch, key, vocab=97, special=SPECIAL)
    arrays = {name: np.asarray(getattr(new, name)) for name in ("tokens", "targets", "weights", "positions")}
    same = np.asarray(new.segment_ids)
    attend = (same[:, :, None] == same[:, None, :]).astype(np.int32)
    expected, theirs = reference.masked_step(tmp_path, {**arrays, "attend": attend})

    model = encoder.build(Compute(dtype="float32"))
    objective = MaskedLM(special=SPECIAL).build(model)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(params, (), new, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["weight"] == arrays["weights"].sum()
    ours = dict(to_theirs(family_of(encoder).rows(encoder), gradients))
    assert ours.keys() <= theirs.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, g in ours.items():
        np.testing.assert_allclose(g, theirs[name], rtol=1e-4, atol=1e-5 * largest, err_msg=name)


def _smaller(path, x):
    return x * 0.5 if path.startswith("layers") and x.ndim > 2 else x


def _one_document(batch):
    return batch._replace(
        segment_ids=jnp.ones_like(batch.segment_ids), positions=jnp.broadcast_to(jnp.arange(40), (4, 40))
    )


def _given(model, new):
    """The loss on a batch that is already masked."""

    def loss(params):
        hidden = model.apply(params, new.tokens, new.positions, new.segment_ids).hidden
        return masked_lm(model.unembed, params, hidden, new, 40)

    return loss


@pytest.mark.parametrize("encoder", [BERT, MOBILE], ids=["bert", "mobilebert"])
def test_every_way_of_computing_gives_the_same_gradient(encoder):
    params = perturbed(encoder)
    ways = (Compute(), Compute(attention=cpu_attention, einsum=cpu_einsum, unroll=None))

    def run(compute, **options):
        objective = MaskedLM(special=SPECIAL, **options).build(encoder.build(compute))
        loss = lambda p: objective.loss(p, (), asked(packed()), jax.random.key(0))[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, exact), other, pieces = run(ways[0]), run(ways[1]), run(ways[0], chunk=2)
    for again, gradient in (other, pieces):
        assert again == pytest.approx(float(value), rel=1e-5)
        for path, g in flatten(gradient).items():
            wanted = flatten(exact)[path]
            assert jnp.abs(g - wanted).max() <= 1e-4 * max(1.0, float(jnp.abs(wanted).max())), path
    silent = ("embed/types", "attn/k_bias")  # a key's bias shifts all scores alike; row 1 of the types is not read
    assert all(jnp.abs(g).max() > 1e-7 for path, g in flatten(exact).items() if not path.endswith(silent))


def test_the_number_of_micro_batches_changes_nothing_of_what_is_hidden():
    """Of a step and of an evaluation: the questions are drawn for the whole batch, and counted alike."""
    objective = MaskedLM(special=SPECIAL).build(BERT.build(Compute(dtype="float32")))
    params, key, view = perturbed(BERT), jax.random.key(3), Identity().build(BERT.axes())
    optimizer = AdamW().build(Constant(peak_lr=1e-3).build(4), BERT.axes())
    state = init_state(lambda _: params, optimizer, view, SKIP, key)
    found = []
    for n in (1, 4):
        _, step = jax.jit(make_step(objective, optimizer, view, key, pieces=lambda batch, n=n: n))(state, (), packed())
        evaluate = make_evaluate(objective, optimizer, view, key, pieces=lambda batch, n=n: n)
        found.append((step, jax.jit(evaluate)(state, (), packed())))
    for one, four in zip(*found, strict=True):
        assert one["weight"] == four["weight"] == Masking()(packed(), key, vocab=97, special=SPECIAL).weights.sum()
        assert one["loss"] == pytest.approx(float(four["loss"]), rel=1e-5)
    assert found[0][0]["grad_norm"] == pytest.approx(float(found[1][0]["grad_norm"]), rel=1e-4)
    assert found[0][0]["loss"] != found[0][1]["loss"], "a step and an evaluation draw with keys of their own"


def test_evaluation_asks_for_hidden_tokens():
    """The same twice, and equal to the loss of the same questions computed at once."""
    model, params = BERT.build(Compute(dtype="float32")), perturbed(BERT)
    prepare = lambda batch, key: BERT.evaluation_batch(batch, key, SPECIAL)  # noqa: E731
    first, again = (evaluate(model, params, [packed(), packed(seed=1)], prepare=prepare) for _ in range(2))
    assert first == again
    nats = weight = 0.0
    for i in range(2):
        new = BERT.evaluation_batch(packed(seed=i), jax.random.fold_in(jax.random.key(0), i), SPECIAL)
        metrics = _given(model, new)(params)[1]
        nats += float(metrics["loss"] * metrics["weight"])
        weight += float(metrics["weight"])
    assert first.loss.value == pytest.approx(nats / weight, rel=1e-5)
    assert first.tokens == weight


def test_flops_count_all_keys_and_the_logits_of_hidden_tokens():
    """BERT of 2 layers, d 32, V 97, T 40: each query sees all 40 keys. The head reads 15% of the tokens."""
    found = flops_per_token(BERT, 40, MaskedLM().predicted)
    assert found.nonembedding == 6 * nonembedding_count(BERT)
    transform = 32 * 32 + 32 + 2 * 32 + 97  # with its bias, the norm, and the bias of the words
    assert found.head == found.nonembedding - 6 * transform + round(6 * (transform + 97 * 32) * 0.15)
    assert found.attention - found.head == 12 * 2 * 32 * 40
    tables = (97 + 64 + 2) * 32
    assert found.total - found.nonembedding == 6 * tables


def test_flops_of_mobilebert_count_both_halves_of_the_table_of_words():
    """V * d = 30522 * 512 in each product with it, although the embedding holds 128 of the 512 columns."""
    found = flops_per_token(mobilebert_base(), 128)
    assert found.head - found.nonembedding == 6 * 30522 * 512
    tables = 30522 * 512 + (512 + 2) * 512
    assert found.total - found.nonembedding == 6 * tables


def test_an_objective_is_refused_by_a_model_that_does_not_fit_it():
    """An encoder would read the next token off its input, and a classifier predicts no tokens."""
    parts = {
        "name": "x",
        "steps": 1,
        "data": PackedText(train=(Part(source="store"),), length=32, batch=2),
        "schedule": Constant(peak_lr=1e-3),
    }
    Experiment(model=BERT, objective=MaskedLM(), **parts)
    with pytest.raises(UserError, match="objective is NextToken, but an encoder sees the next token"):
        Experiment(model=BERT, **parts)
    labels = replace(BERT, head=Classifier())
    with pytest.raises(UserError, match=r"objective is MaskedLM, but model\.head predicts no tokens"):
        Experiment(model=labels, objective=MaskedLM(), **parts)
    with pytest.raises(UserError, match="head, Classifier, predicts no tokens: there is no loss to evaluate"):
        labels.evaluation_batch(packed(), jax.random.key(0), SPECIAL)


def test_a_classifier_is_trained_by_the_weight_of_first_tokens():
    """Labels as targets of the first token of each document; everything else weighs nothing."""
    model = replace(BERT, head=Classifier(labels=("a", "b", "c"))).build(Compute(dtype="float32"))
    params, batch = perturbed(replace(BERT, head=Classifier(labels=("a", "b", "c")))), packed()
    starts = (batch.positions == 0) & (batch.segment_ids > 0)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, starts.shape), jnp.int32)
    batch = batch._replace(targets=labels, weights=starts.astype(jnp.float32))
    loss, metrics = NextToken().build(model).loss(params, (), batch, jax.random.key(0))
    hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
    head = params["head"]
    scores = jnp.tanh(hidden @ head["pool"] + head["pool_bias"]) @ head["classify"] + head["classify_bias"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
    assert metrics["weight"] == 6
    assert float(loss) == pytest.approx(float(nll[starts].mean()), rel=1e-5)
