"""The views that prune while training, in real steps."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy

from slmjax import tree
from slmjax.compress.prune.layout import to_matrices
from slmjax.compress.prune.masks import Global, NOfM, PerLayer, PerRow
from slmjax.compress.prune.view import Cubic, KeepZeros, Movement, Prune
from slmjax.compress.quant.uniform import Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW, Muon
from slmjax.optim.schedules import Constant
from slmjax.serialise import from_json, to_json
from slmjax.train import stored
from slmjax.train.checkpoint import Checkpointer, Checkpoints
from slmjax.train.sharding import Mesh
from slmjax.train.state import evaluation_params
from slmjax.train.step import program
from slmjax.views import EMA, Chain


class Case(NamedTuple):
    """A model and its objective."""

    init: Any
    axes: Any
    objective: Any


LLAMA = llama(layers=2, width=32, heads=2, kv_heads=1, hidden=48, vocab=toy.V, context=16, tied=True).build()
REAL = Case(LLAMA.init, LLAMA.axes, NextToken().build(LLAMA))
TOY = Case(toy.init, toy.AXES, toy.OBJECTIVE)
"""Compiles in a moment"""
AXES = tree.flatten(toy.AXES, is_leaf=tree.is_axes)
MATRICES = ("layers/mlp/down", "layers/mlp/up")
FAST = Cubic(final=0.75, start=2, every=2, times=3)
AT_ONCE = Cubic(final=0.5, initial=0.5, every=1, times=1)
ONE = Mesh(data=1)


def named(x):
    return type(x).__name__


def made(view, *, case=TOY, optimizer=AdamW(weight_decay=0.1), mesh=ONE):  # noqa: B008
    """The compiled functions of a run, the view's, and the optimizer."""
    built = view.build(case.axes)
    tx = optimizer.build(Constant(peak_lr=1e-2).build(100), *stored.optimized(case.axes, built))
    devices = jax.devices()[:1] if mesh == ONE else jax.devices()
    return program(case.init, case.axes, case.objective, tx, built, mesh=mesh.build(devices)), built, tx


def states(view, steps, **how):
    """The state before each step and after the last, on the host."""
    run, _, _ = made(view, **how)
    state = run.init()
    out = [jax.device_get(state)]
    for step in range(steps):
        state, metrics = run.step(state, (), run.put(toy.batch(step)))
        assert np.isfinite(metrics["loss"])
        out.append(jax.device_get(state))
    return out


def masks(state):
    return tree.flatten(state.view["masks"])


def same(a, b):
    a, b = tree.flatten(jax.device_get(a)), tree.flatten(jax.device_get(b))
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_the_cubic_schedule():
    cubic = Cubic(final=0.9, initial=0.1, start=100, every=10, times=20)
    assert cubic.end == 300
    for step, expected in ((100, 0.1), (200, 0.9 - 0.8 * 0.5**3), (300, 0.9)):
        assert cubic.after(int(cubic.rises(step))) == pytest.approx(expected, abs=1e-12)
    assert [int(cubic.rises(step)) for step in (0, 99, 100, 109, 110, 299, 300, 1000)] == [-1, -1, 0, 0, 1, 19, 20, 20]
    for step in range(100, 301, 10):  # the formula as published, at each rise
        formula = 0.9 + (0.1 - 0.9) * (1 - (step - 100) / (20 * 10)) ** 3
        assert cubic.after(int(cubic.rises(step))) == pytest.approx(formula, abs=1e-12)
    assert int(cubic.count(jnp.int32(20))(10**9 + 7)) == round(0.9 * (10**9 + 7)), "exact beyond float32"


@pytest.mark.parametrize("scope", [PerLayer(), PerRow(), NOfM(m=4), Global()], ids=named)
def test_sparsity_follows_the_schedule_and_pruned_weights_stay_pruned(scope):
    seen = states(Prune(schedule=FAST, scope=scope), 11)
    for step, state in enumerate(seen):
        rises = min(max((step - 2) // 2, 0), 3)
        sparsity = 0.75 * (1 - (1 - rises / 3) ** 3)
        found = masks(state)
        assert set(found) == set(MATRICES)
        if scope == Global():
            total = sum(x.size for x in found.values())
            assert sum(int((~x).sum()) for x in found.values()) == round(sparsity * total)
        for path, x in found.items():
            if scope != Global():
                sets = np.asarray(scope.sets(to_matrices(x, AXES[path], path), path))
                assert np.all((~sets).sum(1) == round(sparsity * sets.shape[1])), (step, path)
            if step:
                assert not np.any(x & ~masks(seen[step - 1])[path]), "a pruned weight came back"
            if step > 8:
                np.testing.assert_array_equal(x, masks(seen[8])[path])


def test_the_smallest_weights_of_the_step_are_pruned():
    seen = states(Prune(schedule=Cubic(final=0.5, start=3, every=1, times=1)), 4)
    assert all(x.all() for x in masks(seen[3]).values())
    for path, kept in masks(seen[4]).items():
        size = np.abs(tree.flatten(seen[4].params)[path])
        assert size[~kept].max() < size[kept].min()


def test_pruned_at_once_before_the_first_step():
    state = states(Prune(schedule=AT_ONCE), 0)[0]
    assert all(np.mean(x) == 0.5 for x in masks(state).values())


@pytest.mark.parametrize("view", [Prune(schedule=FAST), Movement(schedule=FAST)], ids=named)
def test_masked_weights_have_no_gradient_and_are_zero_in_evaluation(view):
    state = states(view, 9)[-1]
    _, built, tx = made(view)
    params, own = stored.parts(state.params)

    def loss(params):
        return toy.loss(built.apply(params, own, state.view), (), toy.batch(0), jax.random.key(0))[0]

    gradients, effective = tree.flatten(jax.grad(loss)(params)), tree.flatten(evaluation_params(state, tx, built))
    for path, kept in masks(state).items():
        assert not np.any(np.asarray(gradients[path])[~kept])
        assert np.mean(np.asarray(gradients[path])[kept] != 0) > 0.5
        np.testing.assert_array_equal(effective[path], np.where(kept, tree.flatten(params)[path], 0))
        np.testing.assert_array_equal(effective[path], tree.flatten(built.apply(params, own, state.view))[path])
    for path in AXES.keys() - set(MATRICES):
        np.testing.assert_array_equal(effective[path], tree.flatten(params)[path])


def test_a_rise_in_a_skipped_step_is_made_up_for():
    built = Prune(schedule=FAST).build(toy.AXES)
    params = toy.init(jax.random.key(0))
    _, state = built.init(params, jax.random.key(0))
    for step in range(12):
        if step not in (3, 7):  # the updates that would have raised the sparsity: the second rise and the last
            state = built.update(state, params, {}, jnp.int32(step))
    assert all(np.mean(x) == 0.25 for x in tree.flatten(state["masks"]).values())


def test_movement_scores_sum_weights_times_gradients():
    """With plain gradient descent on a loss whose gradient in the masked weights is known."""
    view = Movement(schedule=Cubic(final=0.5, start=1, every=1, times=2), patterns=("layers/mlp/up",))
    built = view.build(toy.AXES)
    params = toy.init(jax.random.key(0))
    own, state = built.init(params, jax.random.key(1))
    assert not np.any(own["layers"]["mlp"]["up"])
    slope = np.random.default_rng(0).normal(size=params["layers"]["mlp"]["up"].shape).astype(np.float32)
    w = np.asarray(params["layers"]["mlp"]["up"], np.float64)
    scores, kept = np.zeros_like(w), np.ones(w.shape, bool)

    def loss(params, own, state):
        return jnp.sum(built.apply(params, own, state)["layers"]["mlp"]["up"] * slope)

    for step in range(4):
        of_params, of_own = jax.grad(loss, (0, 1))(params, own, state)
        params, own = (jax.tree.map(lambda x, g: x - 0.1 * g, *pair) for pair in ((params, of_params), (own, of_own)))
        state = built.update(state, params, own, jnp.int32(step))
        scores -= 0.1 * w * slope  # pruned weights too
        w = w - 0.1 * slope * kept
        np.testing.assert_allclose(own["layers"]["mlp"]["up"], scores, atol=1e-6)
        np.testing.assert_allclose(params["layers"]["mlp"]["up"], w, atol=1e-6)
        count = round((0.0, 0.4375, 0.5, 0.5)[step] * w.size)
        kept = scores > np.sort(scores, axis=None)[count - 1] if count else kept
        np.testing.assert_array_equal(state["masks"]["layers"]["mlp"]["up"], kept)


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=10.0), Muon()], ids=named)
def test_movement_trains_scores_of_its_own(optimizer):
    seen = states(Movement(schedule=FAST, scores_rate=3.0), 14, optimizer=optimizer)
    own = tree.flatten(stored.parts(seen[-1].params)[1])
    assert set(own) == set(MATRICES)
    assert all(np.mean(x != 0) > 0.9 for x in own.values())
    assert all(np.mean(x) == 0.25 for x in masks(seen[-1]).values())
    returned = [np.any(x & ~masks(seen[10])[path]) for path, x in masks(seen[-1]).items()]
    assert any(returned), "a pruned weight whose score rises comes back"


def test_zeros_stay_zero():
    pruned = states(Prune(schedule=AT_ONCE, scope=NOfM(m=4)), 1)[-1]
    _, built, tx = made(Prune(schedule=FAST))
    start = evaluation_params(pruned, tx, built)
    run, built, tx = made(KeepZeros())
    state = run.given(jax.tree.map(jnp.copy, start))
    for step in range(4):
        state, _ = run.step(state, (), run.put(toy.batch(step)))
    for path in MATRICES:
        before, after = (np.asarray(tree.flatten(x)[path]) for x in (start, evaluation_params(state, tx, built)))
        np.testing.assert_array_equal(before == 0, after == 0)
        assert np.mean(before == 0) == 0.5
        assert np.all(before[before != 0] != after[before != 0])


def test_an_average_is_evaluated_under_the_masks():
    view = EMA(decay=0.5, of=Prune(schedule=FAST))
    state = states(view, 9)[-1]
    _, built, tx = made(view)
    (average, _), inner = state.view
    effective = tree.flatten(evaluation_params(state, tx, built))
    for path, kept in tree.flatten(inner["masks"]).items():
        np.testing.assert_array_equal(effective[path], np.where(kept, average[path], 0))


def test_what_is_left_is_quantized():
    view = Chain(views=(Prune(schedule=FAST), Quantize(rules=(Rule(quantizer=Symmetric(bits=4)),))))
    state = states(view, 9)[-1]
    _, built, tx = made(view)
    effective = tree.flatten(evaluation_params(state, tx, built))
    for path, kept in tree.flatten(state.view[0]["masks"]).items():
        assert not np.any(np.asarray(effective[path])[~kept])
        assert np.mean(np.asarray(effective[path])[kept] != 0) > 0.9
        assert all(len(np.unique(row)) <= 16 for row in to_matrices(effective[path], AXES[path], path)[0])


@pytest.mark.parametrize(("case", "scope"), [(TOY, Global()), (TOY, NOfM(m=4)), (REAL, PerLayer())], ids=named)
def test_a_mesh_changes_nothing(case, scope):
    mesh = Mesh(data=2, fsdp=2, tensor=2)
    view = Prune(schedule=AT_ONCE, scope=scope)
    alone, spread = states(view, 3, case=case), states(view, 3, case=case, mesh=mesh)
    same(masks(alone[-1]), masks(spread[-1]))  # of equal initial weights
    for path, x in tree.flatten(alone[-1].params).items():
        np.testing.assert_allclose(x, tree.flatten(spread[-1].params)[path], rtol=0, atol=2e-4)
    later = Prune(schedule=FAST, scope=scope)
    run, built, _ = made(later, case=case, mesh=mesh)
    state = run.init()  # its weights lie on eight devices
    params, view_state = jax.device_get((state.params, state.view))
    same(jax.jit(built.update)(state.view, state.params, {}, 6), built.update(view_state, params, {}, 6))


@pytest.mark.parametrize("view", [Prune(schedule=FAST, scope=Global()), Movement(schedule=FAST)], ids=named)
def test_resumed_in_the_middle_of_the_schedule_bit_for_bit(view, tmp_path):
    whole = states(view, 9)[-1]
    run, *_ = made(view)
    state = run.init()
    for step in range(5):
        state, _ = run.step(state, (), run.put(toy.batch(step)))
    with Checkpointer(tmp_path, Checkpoints(), lambda text: None) as saved:
        saved.save(5, state, {}, {})
    again, *_ = made(view)
    with Checkpointer(tmp_path, Checkpoints(), lambda text: None) as saved:
        restored = saved.restore(again.abstract)
    assert restored is not None
    state = restored.state
    for step in range(5, 9):
        state, _ = again.step(state, (), again.put(toy.batch(step)))
    same(whole, state)


@pytest.mark.parametrize(
    "view", [Prune(schedule=FAST, scope=NOfM(m=8)), Movement(scope=Global()), KeepZeros(patterns=("*/up",))], ids=named
)
def test_a_view_is_written_into_config_json_and_read_again(view):
    assert from_json(json.loads(json.dumps(to_json(view)))) == view


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(final=1.0), "schedule.final is 1.0"),
        (lambda: Cubic(final=0.4, initial=0.5), "above schedule.final"),
        (lambda: Cubic(every=0), "schedule.every is 0; expected 1 or more"),
        (lambda: Prune(schedule=Cubic(final=0.6), scope=NOfM(m=4)), "not a whole number of every 4"),
        (lambda: Prune().over(1000), "reached at step 1000 .* the run has 1000 steps"),
        (lambda: Movement(schedule=Cubic(initial=0.2)), "all scores of Movement are still 0"),
        (lambda: KeepZeros(patterns=("final_norm/scale",)).build(toy.AXES), "cannot be pruned"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
