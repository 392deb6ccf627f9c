"""The step against plain gradients: accumulation, donation, metrics, meshes, randomness, views."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train import toy

from slmjax import tree
from slmjax.train import micro
from slmjax.train.guard import Skip
from slmjax.train.sharding import Mesh
from slmjax.types import Objective, Optimizer, ParamView

pytestmark = pytest.mark.fast

SGD = Optimizer(optax.sgd(1.0).init, optax.sgd(1.0).update, lambda state, params: params)
"""Learning rate 1: the update is the negative gradient"""


def reference_gradient(params, batch):
    """Each row's gradient by itself, then their mean by weight, in float64 on the host."""
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(toy.B)]
    grad = jax.jit(jax.grad(lambda p, b: toy.loss(p, (), b, None)[0]))
    weights = np.array([row.weights.sum() for row in rows], np.float64)
    grads = [grad(params, row) for row in rows]
    return jax.tree.map(lambda *g: np.average(np.stack(g).astype(np.float64), axis=0, weights=weights), *grads)


def gradient(accumulate, batch):
    program = toy.program(optimizer=SGD, accumulate=accumulate)
    before = jax.device_get(program.init().params)
    state, metrics = program.step(program.init(), (), program.put(batch))
    return jax.tree.map(np.subtract, before, jax.device_get(state.params)), jax.device_get(metrics)


def masked(kind):
    """The rows of each micro-batch (i, i + n, ...) carry very different numbers of tokens."""
    batch = toy.batch(3)
    if kind == "uneven":
        return batch
    weights = np.zeros_like(batch.weights)
    weights[0, :5] = 1.0  # all tokens in one row: every other micro-batch is empty
    return batch._replace(weights=weights)


@pytest.mark.parametrize("kind", ["uneven", "one row"])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_large_batch(accumulate, kind):
    batch = masked(kind)
    got, metrics = gradient(accumulate, batch)
    expected = reference_gradient(jax.device_get(toy.program().init().params), batch)
    for path, g in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(got)[path], g, rtol=2e-5, atol=2e-6, err_msg=path)
    assert metrics["weight"] == batch.weights.sum()
    norm = math.sqrt(sum(float(np.square(g).sum()) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_a_plain_mean_over_micro_batches_would_be_wrong():
    """The test above can fail: unweighted micro-batches give another gradient."""
    batch = masked("uneven")
    params = toy.program().init().params
    losses = [toy.loss(params, (), jax.tree.map(lambda x, i=i: x[i::2], batch), None)[0] for i in (0, 1)]
    whole = toy.loss(params, (), batch, None)[0]
    assert abs(float(whole) - float(np.mean(losses))) > 1e-3


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=2, fsdp=4), Mesh(data=2, fsdp=2, tensor=2), Mesh(data=1, tensor=8)])
def test_every_mesh_trains_alike(mesh):
    one, many = toy.program(), toy.program(mesh, jax.devices(), accumulate=1)
    a, b = one.init(), many.init()
    for path, x in tree.flatten(jax.device_get(a)).items():
        np.testing.assert_allclose(x, tree.flatten(jax.device_get(b))[path], rtol=1e-6, atol=1e-6, err_msg=path)
    for i in range(5):
        a, ma = one.step(a, (), one.put(toy.batch(i)))
        b, mb = many.step(b, (), many.put(toy.batch(i)))
        for name in ma:
            np.testing.assert_allclose(mb[name], ma[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for path, x in tree.flatten(b).items():
        assert x.sharding.is_equivalent_to(tree.flatten(many.abstract)[path].sharding, x.ndim), path


def test_accumulation_on_a_mesh_keeps_rows_where_they_are():
    one, many = toy.program(), toy.program(Mesh(data=2, fsdp=2), jax.devices()[:4], accumulate=2)
    _, a = one.step(one.init(), (), one.put(toy.batch(0)))
    compiled = many.step.lower(many.abstract, (), many.put(toy.batch(0))).compile()
    _, b = compiled(many.init(), (), many.put(toy.batch(0)))
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
    assert "all-to-all" not in compiled.as_text()


@pytest.mark.parametrize("kind", ["uneven", "one row"])
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_evaluation_in_micro_batches_measures_the_whole_batch(pieces, kind):
    batch = masked(kind)
    program = toy.program(micro_tokens=toy.B // pieces * toy.T, view=toy.EMA)
    metrics = program.evaluate(program.init(), (), program.put(batch))
    params = jax.device_get(program.params(program.init()))
    _, expected = toy.loss(params, (), batch, None)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    assert metrics["weight"] == batch.weights.sum()
    compiled = program.evaluate.lower(program.abstract, (), program.put(batch)).as_text()
    assert ("stablehlo.while" in compiled) == (pieces > 1)  # not the whole batch at once under another name


def test_evaluation_of_nothing_is_zero():
    program = toy.program(micro_tokens=toy.T)
    empty = toy.batch(0)._replace(weights=np.zeros((toy.B, toy.T), np.float32))
    assert {name: float(x) for name, x in program.evaluate(program.init(), (), program.put(empty)).items()} == {
        "loss": 0.0,
        "weight": 0.0,
    }


def test_how_many_micro_batches():
    """Against all that could be: whole rows on each device, at least so many tokens on each, and as many as can be."""
    for rows, length, ways, tokens in itertools.product(
        (1, 2, 6, 8, 12, 16, 24), (7, 64), (1, 2, 4), (1, 64, 100, 512)
    ):
        for least in (n for n in range(1, rows + 1) if rows % n == 0):
            fine = {n for n in range(1, rows + 1) if rows % (n * ways) == 0 and rows * length >= tokens * n * ways}
            expected = max({least} | fine)
            assert micro.count(rows, length, ways=ways, least=least, tokens=tokens) == expected
            assert micro.count(rows, length, ways=ways, least=least) == least
    assert micro.count(8, 512, tokens=1024) == 4
    assert micro.count(16, 256, ways=2, tokens=1024) == 2
    assert micro.count(16, 256, least=8, tokens=1024) == 8


def test_micro_batches_that_the_platform_asks_for_change_no_result():
    one = toy.program()
    many = toy.program(Mesh(data=2, fsdp=2), jax.devices()[:4], micro_tokens=toy.T)
    put = many.put(toy.batch(0))
    compiled = many.step.lower(many.abstract, (), put).compile()
    assert "all-to-all" not in compiled.as_text()
    assert "stablehlo.while" in many.step.lower(many.abstract, (), put).as_text()
    a, b = one.init(), many.init()
    for i in range(3):
        a, ma = one.step(a, (), one.put(toy.batch(i)))
        b, mb = many.step(b, (), many.put(toy.batch(i)))
        for name in ma:
            np.testing.assert_allclose(mb[name], ma[name], rtol=1e-5, atol=1e-6, err_msg=name)
    ea, eb = one.evaluate(a, (), one.put(toy.batch(9))), many.evaluate(b, (), many.put(toy.batch(9)))
    np.testing.assert_allclose(eb["loss"], ea["loss"], rtol=1e-5)


def test_the_state_is_donated_and_the_step_compiled_once():
    program = toy.program()
    state = program.init()
    frozen = {"teacher": jnp.ones(3)}
    for i in range(4):
        before = state
        state, _ = program.step(state, frozen, program.put(toy.batch(i)))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert not frozen["teacher"].is_deleted()
    assert program.step.compiled == 1
    assert int(state.step) == 4


def test_metrics_are_float32_scalars_and_the_rate_counts_updates_made():
    program = toy.program(schedule=lambda step: 10.0 - step)
    state, rates = program.init(), []
    for i in range(4):
        batch = toy.batch(i)
        if i == 1:
            batch.weights[0, 0] = np.nan
        state, metrics = program.step(state, (), program.put(batch))
        rates.append(float(metrics["lr"]))
    assert all(x.shape == () and x.dtype == np.float32 for x in metrics.values())
    assert rates == [10.0, 9.0, 9.0, 8.0]  # the step that was refused used up none of the schedule
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-6)


def test_randomness_depends_on_seed_step_and_micro_batch():
    def noise(params, frozen, batch, key):
        value = jax.random.uniform(key) + 0 * params["final_norm"]["scale"].sum()
        return value, {"loss": value, "weight": jnp.ones(())}

    def drawn(seed, accumulate=1):
        program = toy.program(objective=Objective(noise), seed=seed, accumulate=accumulate)
        state, out = program.init(), []
        for i in range(3):
            state, metrics = program.step(state, (), program.put(toy.batch(i)))
            out.append(float(metrics["loss"]))
        return out

    assert drawn(0) == drawn(0)
    assert len({*drawn(0), *drawn(1), *drawn(0, accumulate=2)}) == 9


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_asked_and_what_the_loss_draws_are_independent(accumulate):
    """`split(key, n)[i]` is `fold_in(key, i)`: what splits the step's key must not meet the keys of micro-batches."""

    def ask(batch, key):
        return batch._replace(weights=jnp.full_like(batch.weights, jax.random.uniform(jax.random.split(key, 3)[0])))

    def loss(params, frozen, batch, key):
        asked, drawn = batch.weights[0, 0], jax.random.uniform(key)
        value = drawn + 0 * params["final_norm"]["scale"].sum()
        return value, {"loss": value, "asked": asked, "same": asked == drawn, "weight": jnp.ones(())}

    program = toy.program(
        objective=Objective(loss, prepare=ask), accumulate=accumulate, micro_tokens=toy.B * toy.T // 2
    )
    state, batches = program.init(), [program.put(toy.batch(i)) for i in (0, 1, 0)]
    one, two, again = (program.evaluate(state, (), batch) for batch in batches)
    _, step = program.step(state, (), batches[0])
    assert [float(x["same"]) for x in (step, one, two)] == [0.0, 0.0, 0.0]
    assert len({float(x["asked"]) for x in (step, one, two)}) == 3
    assert float(again["asked"]) == float(one["asked"])


def test_a_view_is_trained_through_and_another_evaluated():
    half = ParamView(
        init=lambda params, key: ({}, jnp.zeros(())),
        apply=lambda params, own, state: jax.tree.map(lambda p: p / 2, params),
        update=lambda state, params, own, step: state + 1,
        evaluate=lambda params, own, state: jax.tree.map(lambda p: p * 0 + state, params),
    )
    program = toy.program(view=half, optimizer=SGD)
    params = jax.device_get(program.init().params)
    batch = toy.batch(0)
    expected = jax.grad(lambda p: toy.loss(jax.tree.map(lambda x: x / 2, p), (), batch, None)[0])(params)
    state, _ = program.step(program.init(), (), program.put(batch))
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    np.testing.assert_allclose(moved["embed"]["table"], expected["embed"]["table"], rtol=1e-4, atol=1e-6)
    ones = jax.tree.map(jnp.ones_like, params)
    assert all((x == 1).all() for x in jax.tree.leaves(program.params(state)))
    got = program.evaluate(state, (), program.put(batch))
    np.testing.assert_allclose(got["loss"], toy.loss(ones, (), batch, None)[0], rtol=1e-6)


def test_frozen_parameters_reach_the_objective():
    def distance(params, frozen, batch, key):
        value = jnp.square(params["final_norm"]["scale"] - frozen).sum()
        return value, {"loss": value, "weight": batch.weights.sum()}

    program = toy.program(objective=Objective(distance), guard=Skip(sigma=None))
    state = program.init()
    for i in range(2):
        state, metrics = program.step(state, jnp.full(toy.D, 1.02), program.put(toy.batch(i)))
    assert float(metrics["loss"]) < toy.D * 0.02**2
