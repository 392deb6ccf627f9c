"""The objective of distillation: its value by the definition, its pieces, and that no gradient reaches a teacher."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance.test_invariance import QUICK, VOCAB, alone, drawn, text, token_batch

from slmjax import tree
from slmjax.compress.quant.into_memory import floats
from slmjax.distill.objective import Distill
from slmjax.distill.relations import Relations
from slmjax.distill.teacher import Teacher, average
from slmjax.distill.terms import Term
from slmjax.errors import UserError
from slmjax.losses.divergences import JSD, ForwardKL, ReverseKL
from slmjax.losses.masked_lm import Masking
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.nn.encoded import is_encoded
from slmjax.objectives import MaskedLM, NextToken
from slmjax.tree import flatten
from slmjax.types import Special

pytestmark = pytest.mark.fast

FLOAT32 = Compute(dtype="float32")


def decoder(width, vocab=VOCAB):
    return llama(layers=1, width=width, heads=2, kv_heads=1, hidden=24, vocab=vocab, context=64)


def teacher(assembly, seed=0):
    model = assembly.build(FLOAT32)
    params = jax.tree.map(lambda x: jnp.asarray(x + np.float32(0.1 * seed)), drawn(model))
    return Teacher(source=f"teacher {seed}", assembly=assembly, model=model, params=params)


@pytest.fixture(scope="module")
def case():
    student = decoder(16, VOCAB + 5).build(FLOAT32)
    teachers = (teacher(decoder(24, VOCAB + 2)), teacher(decoder(32), 1))
    batch = jax.tree.map(jnp.asarray, token_batch(alone(text()), 16))
    return student, jax.tree.map(jnp.asarray, drawn(student)), teachers, batch


def taught(teachers, **options):
    return Distill(teachers=tuple(t.source for t in teachers), **options).with_models(teachers, tokens=VOCAB)


def logits(model, params, batch):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(params, batch):
        return model.unembed(params, model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden)

    return f(params, batch)


def computed(objective, params, batch):
    f = lambda p: objective.loss(p, objective.frozen, batch, jax.random.key(0))  # noqa: E731
    return jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=QUICK)(params)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD()])
def test_the_loss_is_that_of_the_definition(case, divergence):
    student, params, teachers, batch = case
    spec = taught(teachers, divergence=divergence, temperature=3.0, match=0.7, cross_entropy=0.2, chunk=5)
    (loss, metrics), _ = computed(spec.build(student), params, batch)
    ours = logits(student, params, batch)
    theirs = [logits(t.model, t.params, batch) for t in teachers]
    target = average(theirs, temperature=3.0, outputs=VOCAB + 5, tokens=VOCAB)
    share = batch.weights / batch.weights.sum()
    nll = -jnp.take_along_axis(jax.nn.log_softmax(ours), batch.targets[..., None], -1)[..., 0]
    value = (share * divergence(target, jax.nn.log_softmax(ours / 3.0))).sum()
    assert metrics["divergence"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float((share * nll).sum()), rel=1e-5)
    assert loss == pytest.approx(float(0.2 * (share * nll).sum() + 0.7 * 9 * value), rel=1e-5)
    same = target.argmax(-1) == ours.argmax(-1)
    assert metrics["agreement"] == pytest.approx(float((share * same).sum()), rel=1e-5)


def test_pieces_change_nothing(case):
    student, params, teachers, batch = case
    (whole, _), grads = computed(taught(teachers, chunk=64).build(student), params, batch)
    for chunk in (1, 5):
        (loss, _), cut = computed(taught(teachers, chunk=chunk).build(student), params, batch)
        assert loss == pytest.approx(float(whole), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), cut, grads)


def test_a_teacher_in_8_bits_teaches_what_its_rounded_weights_say(case):
    student, params, teachers, batch = case
    spec = taught(teachers[:1], teacher_bits=8)
    (loss, _), gradient = computed(spec.build(student), params, batch)
    kept = spec.teachers[0].params
    values = floats(kept)
    same = replace(teachers[0], params=values)
    (expected, _), exact = computed(taught((same,)).build(student), params, batch)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, exact)
    plain, flat = flatten(teachers[0].params), flatten(values)
    moved = {path for path, x in plain.items() if not np.array_equal(x, flat[path])}
    assert moved == {path for path in plain if path.startswith("layers/") and plain[path].ndim > 2}
    for path in moved:  # half a step of the largest weight of a channel, and what its float16 scale adds
        assert np.abs(plain[path] - flat[path]).max() <= 0.51 * np.abs(plain[path]).max() / 127
        assert tree.nbytes({"x": flatten(kept, is_leaf=is_encoded)[path]}) < 0.3 * plain[path].nbytes


def test_no_gradient_reaches_a_teacher(case):
    student, params, teachers, batch = case
    objective = taught(teachers, terms=(Term(loss=Relations(heads=4), teacher=1),)).build(student)
    f = jax.jit(jax.grad(lambda f: objective.loss(params, f, batch, None)[0]), compiler_options=QUICK)
    by_teacher = f(objective.frozen)
    assert all(not np.any(g) for g in jax.tree.leaves(by_teacher))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(case):
    batch = case[-1]
    one = teacher(decoder(16))
    objective = taught((one,), cross_entropy=0.0, match=1.0).build(one.model)
    (loss, metrics), grads = computed(objective, one.params, batch)
    assert abs(loss) < 1e-6
    assert metrics["agreement"] == pytest.approx(1, rel=1e-6)
    assert all(np.abs(g).max() < 1e-5 for g in jax.tree.leaves(grads))
    shifted = batch._replace(tokens=jnp.roll(batch.tokens, 1, axis=1))
    ours = logits(one.model, one.params, batch)
    theirs = logits(one.model, one.params, shifted)
    off_by_one = ForwardKL()(jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours))
    assert (off_by_one * batch.weights).sum() / batch.weights.sum() > 0.1, "reading the neighbour's targets shows"


def test_masked_positions_of_an_encoder_are_the_ones_that_are_matched():
    small = {"layers": 1, "heads": 2, "hidden": 24, "vocab": VOCAB, "context": 64}
    student, big = bert(width=16, **small), teacher(bert(width=32, **small))
    task = MaskedLM(masking=Masking(rate=0.4), special=Special(mask=3, all=(0, 3)))
    objective = taught((big,), task=task).build(student.build(FLOAT32))
    batch = jax.tree.map(jnp.asarray, token_batch(alone(text()), 16))
    prepared = objective.prepare(batch, jax.random.key(0))
    params = jax.tree.map(jnp.asarray, drawn(student.build(FLOAT32)))
    (_, metrics), _ = computed(objective, params, prepared)
    assert 0 < metrics["weight"] == prepared.weights.sum() < batch.weights.size
    ours, theirs = logits(student.build(FLOAT32), params, prepared), logits(big.model, big.params, prepared)
    kl = ForwardKL()(jax.nn.log_softmax(theirs / 2), jax.nn.log_softmax(ours / 2))
    mean = float((kl * prepared.weights).sum() / prepared.weights.sum())
    assert metrics["divergence"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": ()}, "teachers is empty"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"teacher_bits": 1}, "teacher_bits: 1 is not in 2 to 8"),
        ({"match": 0.0}, "match: 0.0 is not above 0"),
        ({"cross_entropy": -1.0}, "cross_entropy: -1.0 is negative"),
        ({"task": NextToken(z_loss=0.1)}, "z_loss and chunk are not used"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Distill(**{"teachers": ("runs/teacher",), **options})


def test_a_teacher_of_another_kind_is_refused():
    spec = Distill(teachers=("runs/teacher",))
    encoder = bert(layers=1, width=16, heads=2, hidden=24, vocab=VOCAB, context=64)
    with pytest.raises(UserError, match="is an encoder and the student is a decoder"):
        spec.accepts("runs/teacher", encoder, decoder(16), 32)
    with pytest.raises(UserError, match=r"data\.length is 65, longer than the context 64"):
        spec.accepts("runs/teacher", decoder(16), decoder(16), 65)
    with pytest.raises(UserError, match="without its teachers"):
        spec.build(decoder(16).build(FLOAT32))
