"""Terms: layer maps, schedules of weights, means over documents, what is checked, and what a run carries for them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill.test_features import SEGMENTS, arrays, of
from invariance.test_invariance import QUICK, VOCAB

from slmjax import tree
from slmjax.distill import recipes, terms
from slmjax.distill.features import HiddenCosine, HiddenMSE
from slmjax.distill.layer_maps import Embedding, Explicit, Last, OneToOne, Skip, Uniform
from slmjax.distill.objective import Distill
from slmjax.distill.relations import AttentionKL, AttentionScores, Relations
from slmjax.distill.terms import Progressive, Ramp, Term
from slmjax.errors import UserError
from slmjax.models.assembly import Stage
from slmjax.models.families.bert import bert
from slmjax.models.families.lfm2 import lfm2
from slmjax.models.families.llama import llama
from slmjax.nn.attention import Attention
from slmjax.nn.compute import Compute
from slmjax.train.sharding import Layout, Mesh
from slmjax.types import Batch
from slmjax.views import EMA, IDENTITY, OBJECTIVE, Carried, Identity, Matrix, carrying, without_objective

SMALL = {"width": 16, "heads": 4, "hidden": 24, "vocab": VOCAB, "context": 64}


@pytest.mark.parametrize(
    ("layers", "numbers", "pairs"),
    [
        (Uniform(), (4, 12), ((1, 3), (2, 6), (3, 9), (4, 12))),
        (Uniform(), (4, 6), ((1, 2), (2, 3), (3, 5), (4, 6))),
        (Uniform(), (3, 1), ((1, 1), (2, 1), (3, 1))),
        (Last(), (4, 12), ((4, 12),)),
        (Last(count=3), (4, 12), ((2, 10), (3, 11), (4, 12))),
        (Skip(every=2), (4, 12), ((1, 2), (2, 4), (3, 6), (4, 8))),
        (OneToOne(), (3, 3), ((1, 1), (2, 2), (3, 3))),
        (Explicit(to=((0, 0), (4, 11))), (4, 12), ((0, 0), (4, 11))),
        (Embedding(), (4, 12), ((0, 0),)),
    ],
)
def test_layer_maps(layers, numbers, pairs):
    assert layers.pairs(*numbers) == pairs


def test_weights_follow_their_schedule():
    at = lambda weight, step: weight(jnp.int32(step), 3).tolist()  # noqa: E731
    ramp = Ramp(start=1.0, end=3.0, steps=4)
    assert [at(ramp, step)[0] for step in (0, 1, 2, 4, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    progressive = Progressive(each=10, weight=2.0, kept=0.5, after=0.25)
    expected = {0: [2, 0, 0], 9: [2, 0, 0], 10: [0.5, 2, 0], 29: [0.5, 0.5, 2], 30: [0.25] * 3, 99: [0.25] * 3}
    assert {step: at(progressive, step) for step in expected} == expected


def test_the_sum_of_terms_is_that_of_the_definition():
    x, rng = arrays(), np.random.default_rng(1)
    weights = (rng.random(SEGMENTS.shape) * (SEGMENTS > 0)).astype(np.float32)
    weights[0, 4:7] = 0  # a document without any target
    pairs = ((1, 2), (2, 3))
    mse = HiddenMSE(layers=Explicit(to=pairs), teacher_width=5)
    kl = AttentionKL(layers=Last())
    chosen = (
        Term(loss=mse, weight=Progressive(each=10, weight=2.0, kept=0.5)),
        Term(loss=kl, weight=3.0, everywhere=False),
        Term(loss=kl),
    )
    own = {"0": {"projection": x["projection"]}}
    batch = Batch(SEGMENTS, SEGMENTS, weights, SEGMENTS, SEGMENTS)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def found(x, own, batch):
        student, teacher = of(x, "s"), of(x, "t")
        each = [mse(student, teacher, pair, batch.segment_ids, own["0"]) for pair in pairs]
        values = *each, kl(student, teacher, (2, 3), batch.segment_ids, {})
        mine = {"own": own, "step": jnp.int32(15)}
        return values, *(terms.measured(chosen, student, [teacher], batch, m) for m in (mine, None))

    values, (total, metrics), (_, evaluated) = jax.device_get(found(x, own, jax.tree.map(jnp.asarray, batch)))

    def mean(values, everywhere=True):
        out = 0.0
        for row, number in ((0, 1), (0, 2), (1, 1), (1, 2)):
            at = SEGMENTS[row] == number
            v = values[row][at]
            out += ((v.mean() if everywhere else v) * weights[row][at]).sum()
        return out / weights.sum()

    one, two, three = values
    assert total == pytest.approx(0.5 * mean(one) + 2 * mean(two) + 3 * mean(three, False) + mean(three), rel=1e-5)
    assert sorted(metrics) == ["attention_kl", "attention_kl_2", "hidden_mse"]
    assert metrics["hidden_mse"] == pytest.approx(mean(one) + mean(two), rel=1e-5)
    assert metrics["attention_kl_2"] == pytest.approx(mean(three), rel=1e-5)
    assert metrics["attention_kl"] != pytest.approx(mean(three), rel=1e-3)
    assert sorted(evaluated) == ["attention_kl", "attention_kl_2"], "no projection, no loss that needs one"


def objective(loss):
    return Distill(teachers=("runs/teacher",), terms=(Term(loss=loss),))


@pytest.mark.parametrize(
    ("loss", "student", "message"),
    [
        (
            AttentionKL(layers=Skip(every=3)),
            {},
            r"terms.0.loss.layers.every: layer 2 .* from layer 6 of a teacher with 4",
        ),
        (AttentionKL(layers=Last(count=3)), {}, "layers.count: 3 layers, but the student has 2 and the teacher 4"),
        (AttentionKL(layers=OneToOne()), {}, "layers: OneToOne, but the student has 2 layers and the teacher 4"),
        (HiddenMSE(layers=Explicit(to=((1, 5),))), {}, r"layers.to: \(1, 5\) is out of range; .* the teacher 1 to 4"),
        (AttentionKL(layers=Embedding()), {}, "layers: layer 0 of the student has no attention"),
        (AttentionScores(), {"heads": 2}, r"layer 1 of the student has heads 2, and layer 2 of the teacher 4; use Rel"),
        (Relations(), {"heads": 2}, "layer 1 of the student has heads of queries 2, .* set `heads`"),
        (Relations(heads=3), {}, "heads: 3 relation heads do not divide the 16 channels of the student's queries"),
        (
            HiddenMSE(),
            {"width": 32},
            "teacher_width: None, but .* student have 32 channels and .* teacher 16; set it to 16",
        ),
        (HiddenMSE(teacher_width=8), {}, "teacher_width: 8, but hidden vectors of the teacher have 16 channels"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(loss, student, message):
    teacher, student = bert(layers=4, **SMALL), bert(layers=2, **{**SMALL, **student})
    with pytest.raises(UserError, match=message) as caught:
        objective(loss).accepts("runs/teacher", teacher, student, 32)
    assert "\n" not in str(caught.value)


def test_models_without_attention_in_a_layer():
    hybrid = lfm2(attends=(False, True), width=16, heads=4, kv_heads=2, hidden=24, vocab=VOCAB, context=64)
    with pytest.raises(UserError, match="layer 1 of the student has no attention"):
        objective(AttentionKL()).accepts("runs/teacher", hybrid, hybrid, 32)
    objective(AttentionKL(layers=Last())).accepts("runs/teacher", hybrid, hybrid, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distill(teachers=("a",), terms=(Term(loss=HiddenMSE(), teacher=1),)), "terms.0.teacher: 1 is not"),
        (lambda: Distill(teachers=("a",), terms=(Term(loss=HiddenMSE(), weight=-1.0),)), "weight: -1.0 is negative"),
        (lambda: HiddenMSE(teacher_width=0), "teacher_width: 0 is not a positive"),
        (lambda: Relations(queries=0.0, keys=0.0, values=0.0), "all factors are 0"),
        (lambda: Relations(keys=-1.0), "keys: -1.0 is negative"),
        (lambda: Ramp(steps=0), "weight.steps: 0 is not"),
        (lambda: Progressive(each=0), "weight.each: 0 is not"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_terms_of_published_methods_fit_the_models_of_their_papers():
    base = bert(layers=12, width=768, heads=12, hidden=3072)
    for chosen, student in (
        (recipes.tinybert(teacher_width=768), bert(layers=4, width=312, heads=12, hidden=1200)),
        (recipes.distilbert(), bert(layers=6, width=768, heads=12, hidden=3072)),
        (recipes.mobilebert(each=10), base),
        (recipes.minilm(), bert(layers=6, width=384, heads=12, hidden=1536)),
        (
            recipes.minilm2(heads=48, teacher_layer=11, student_layer=6),
            bert(layers=6, width=384, heads=12, hidden=1536),
        ),
    ):
        spec = Distill(teachers=("a",), terms=chosen, match=0.0, cross_entropy=0.0)
        spec.accepts("a", base, student, 128)
    assert spec.carried(student) is None
    carried = Distill(teachers=("a",), terms=recipes.tinybert(768)).carried(bert(layers=4, **SMALL))
    assert {path: m.shape for path, m in carried.matrices.items()} == dict.fromkeys(
        ("1/projection", "2/projection"), (16, 768)
    )
    assert Distill(teachers=("a",), terms=recipes.mobilebert(each=1)).carried(base) == Carried(matrices={})


def test_what_is_collected_is_what_attention_reads():
    """By the definition of queries, keys and values, in NumPy; layers of several stages come in their order."""
    model = bert(layers=2, **SMALL)
    model = replace(model, tail=(Stage(pattern=(replace(model.pattern[0], branch_scale=0.5), *model.pattern)),))
    built = model.build(Compute(dtype="float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(built.init, jax.random.key(0))
    )
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        return built.apply(params, tokens, tokens % 5, tokens * 0 + 1, collect=True)

    out = jax.device_get(run(params))
    where = [("layers", 0), ("layers", 1), ("layers_1/0", 0), ("layers_1/1", 0)]
    flat = tree.flatten(params)
    for number, (path, entry) in enumerate(where):
        for name, x in out.attention[number].items():
            weight, bias = (flat[f"{path}/attn/{name}{end}"][entry] for end in ("", "_bias"))
            wanted = np.einsum("btd,dhk->bthk", out.blocks[number], weight) + bias
            np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-4)


class Plain(Attention):
    """Attention as it would be if nothing could be collected."""

    def attended(self, layer, q, k, v, flow, width):
        y = layer.compute.attention(q, k, v, flow.mask, self.rule)
        shape, axes = (self.heads, self.head_dim, width), ("heads", "head_dim", "embed")
        return layer.linear("o", "bthk,hkd->btd", y, shape, axes, bias=self.o_bias, residual=True)


def test_where_nothing_is_collected_the_program_is_the_same():
    model = llama(layers=2, kv_heads=2, **SMALL)
    mixer = Plain(**vars(model.pattern[0].mixer))
    plain = replace(model, pattern=(replace(model.pattern[0], mixer=mixer),))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)

    def program(model, collect=False):
        built = model.build()
        f = lambda params, ids: built.apply(params, ids, ids, ids, collect=collect).hidden.sum()  # noqa: E731
        params = jax.eval_shape(built.init, jax.random.key(0))
        return str(jax.make_jaxpr(jax.value_and_grad(f))(params, ids))

    assert program(model) == program(plain)
    assert program(model) != program(model, collect=True)


AXES = {"layers": {"w": ("layers", "embed")}}


def test_what_an_objective_carries_is_trained_counted_and_not_evaluated():
    params = {"layers": {"w": jnp.ones((2, 8))}}
    inner = EMA(decay=0.5).build(AXES)
    view = carrying(inner, Carried(matrices={"0/projection": Matrix(shape=(64, 32), axes=("embed", None))}))
    own, state = view.init(params, jax.random.key(0))
    assert own.keys() == {OBJECTIVE}
    projection = own[OBJECTIVE]["0"]["projection"]
    assert projection.std() == pytest.approx(64**-0.5, rel=0.1)
    assert tree.flatten(view.axes, is_leaf=tree.is_axes) == {"objective/0/projection": ("embed", None)}
    for step in range(3):
        model, mine = without_objective(view.apply(params, own, state))
        assert model.keys() == params.keys()
        assert mine["step"] == step
        assert mine["own"]["0"]["projection"] is projection
        state = view.update(state, params, own, step)
    evaluated = without_objective(view.evaluate(params, own, state))
    jax.tree.map(np.testing.assert_array_equal, evaluated, (inner.evaluate(params, {}, state[0]), None))
    assert view.pack(params, own, state) == {}
    assert Distill(teachers=("a",), terms=(Term(loss=HiddenCosine()),)).carried(bert(layers=1, **SMALL)) is None
    assert Identity().build(AXES) is IDENTITY


def test_parameters_split_over_devices_are_gathered_with_what_an_objective_carries():
    mesh = Mesh(fsdp=2, data=1).build(jax.devices()[:2])
    params = {"layers": {"w": jnp.ones((2, 8))}}
    view = carrying(IDENTITY, Carried(matrices={"0/projection": Matrix(shape=(8, 4), axes=("embed", None))}))
    own, state = view.init(params, jax.random.key(0))
    gather = Layout().gather(params, AXES, mesh)
    placed = [Layout().shardings(x, axes, mesh) for x, axes in ((params, AXES), (own, view.axes))]
    split = [jax.device_put(x, s) for x, s in zip((params, own), placed, strict=True)]
    assert not jax.tree.leaves(split[1])[0].sharding.is_fully_replicated
    found = jax.jit(lambda params, own: gather(view.apply(params, own, state)))(*split)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(found[OBJECTIVE]["own"]["0"]["projection"], own[OBJECTIVE]["0"]["projection"])
