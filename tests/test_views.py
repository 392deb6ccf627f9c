"""Views against closed forms and the laws of composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.errors import UserError
from slmjax.types import Group, ParamView
from slmjax.views import EMA, IDENTITY, Chain, Identity, chain, selected, stateless

pytestmark = pytest.mark.fast

KEY = jax.random.key(0)
AXES = {"a": ("embed",), "b": {"c": ("embed", "mlp")}}
PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": {"c": jnp.array([[0.5, 4.0]])}}


def affine(scale, shift):
    """x -> scale * x + shift + count, where count is a state that grows by the sum of the stored parameters."""
    return ParamView(
        init=lambda params, key: ({}, sum(jnp.sum(x) for x in jax.tree.leaves(params))),
        apply=lambda params, own, count: jax.tree.map(lambda x: scale * x + shift + count, params),
        update=lambda count, params, own, step: count + step * sum(jnp.sum(x) for x in jax.tree.leaves(params)),
        evaluate=lambda params, own, count: jax.tree.map(lambda x: shift * x - count, params),
    )


def run(view, params=PARAMS):
    """Everything that a view says over three updates."""
    (own, state), seen = view.init(params, KEY), []
    for step in range(3):
        params = jax.tree.map(lambda x: x * 1.5 + 1, params)
        state = view.update(state, params, own, step)
        seen.append((view.apply(params, own, state), view.evaluate(params, own, state), jax.tree.leaves(state)))
    return seen


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


A, B, C = affine(2.0, 1.0), affine(-1.0, 0.5), affine(0.5, 3.0)


@pytest.mark.parametrize("same", [chain(A), chain(IDENTITY, A), chain(A, IDENTITY), chain(chain(), A)])
def test_identity_law(same):
    assert_same(run(same), run(A))


def test_associativity():
    flat = run(chain(A, B, C))
    assert_same(run(chain(chain(A, B), C)), flat)
    assert_same(run(chain(A, chain(B, C))), flat)


def test_order_matters():
    assert not np.allclose(run(chain(A, C))[0][0]["a"], run(chain(C, A))[0][0]["a"])


def test_chain_feeds_each_view_the_effective_parameters_of_the_one_before():
    effective = chain(A, B).apply(PARAMS, {}, (10.0, 20.0))
    np.testing.assert_allclose(effective["a"], -(2 * PARAMS["a"] + 1 + 10) + 0.5 + 20)
    seen_by_second = chain(A, B).init(PARAMS, KEY)[1][1]
    first = A.apply(PARAMS, *A.init(PARAMS, KEY))
    np.testing.assert_allclose(seen_by_second, sum(x.sum() for x in jax.tree.leaves(first)))


def test_gradient_flows_through_a_chain():
    grads = jax.grad(lambda p: chain(A, B).apply(p, {}, (0.0, 0.0))["a"].sum())(PARAMS)
    np.testing.assert_array_equal(grads["a"], [-2.0, -2.0, -2.0])
    np.testing.assert_array_equal(grads["b"]["c"], [[0.0, 0.0]])


def test_identity_has_no_state():
    assert jax.tree.leaves(Identity().build(AXES).init(PARAMS, KEY)) == []
    assert Identity().build(AXES).evaluate(PARAMS, {}, ()) is PARAMS


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97])
def test_ema_is_the_weighted_mean_of_all_parameters_seen(decay):
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(40, 3))
    view = EMA(decay=decay).build(AXES)
    _, state = view.init({"w": jnp.float32(xs[0])}, KEY)
    for t, x in enumerate(xs[1:]):
        state = jax.jit(view.update)(state, {"w": jnp.float32(x)}, {}, jnp.int32(t))

    keep = np.array([min(decay, (1 + t) / (10 + t)) for t in range(39)])
    weights = np.array([1.0, *(1 - keep)]) * np.array([np.prod(keep[t:]) for t in range(40)])
    np.testing.assert_allclose(weights.sum(), 1.0)
    np.testing.assert_allclose(view.evaluate({"w": jnp.zeros(3)}, {}, state)["w"], weights @ xs, atol=1e-6)


def test_ema_leaves_training_alone():
    view = EMA(decay=0.9).build(AXES)
    assert view.apply(PARAMS, *view.init(PARAMS, KEY)) is PARAMS


def test_ema_state_is_not_the_parameters_own_memory():
    """Else donating both to the step would be refused."""
    view = EMA(decay=0.9).build(AXES)
    init = jax.jit(lambda: (PARAMS, view.init(PARAMS, KEY)[1]))
    step = jax.jit(lambda params, state: (params, view.update(state, params, {}, 0)), donate_argnums=(0, 1))
    jax.block_until_ready(step(*init()))


def test_chain_as_an_experiment_writes_it():
    view = Chain(views=(EMA(decay=0.5), Identity())).build(AXES)
    own, state = view.init(PARAMS, KEY)
    assert own == {}
    moved = jax.tree.map(lambda x: x + 1, PARAMS)
    state = view.update(state, moved, own, 10**9)
    np.testing.assert_allclose(view.evaluate(moved, own, state)["a"], PARAMS["a"] + 0.5)
    np.testing.assert_array_equal(view.apply(moved, own, state)["a"], moved["a"])


def test_bad_decay_is_named():
    with pytest.raises(UserError, match=r"view\.decay is 1\.0"):
        EMA(decay=1.0)


def scaled(initial, frozen=()):
    """Multiplies everything by a scale of its own, which starts at `initial`."""
    return stateless(
        lambda params, own: jax.tree.map(lambda x: x * own["scale"], params),
        own=lambda params, key: {"scale": jnp.float32(initial)},
        axes={"scale": ()},
        groups={"scale": Group(rate=initial)},
        frozen=frozenset(frozen),
    )


def test_each_view_of_a_chain_has_parameters_of_its_own():
    view = chain(scaled(2.0, frozen={"a"}), A, scaled(3.0, frozen={"b/c"}))
    own, state = view.init(PARAMS, KEY)
    assert own == {"0": {"scale": 2.0}, "2": {"scale": 3.0}}
    assert view.axes == {"0": {"scale": ()}, "2": {"scale": ()}}
    assert view.groups == {"0/scale": Group(rate=2.0), "2/scale": Group(rate=3.0)}
    assert view.frozen == {"a", "b/c"}
    between = A.apply({"a": 2 * PARAMS["a"]}, {}, state[1])
    np.testing.assert_allclose(view.apply(PARAMS, own, state)["a"], 3 * between["a"])
    slopes = jax.grad(lambda own: view.apply(PARAMS, own, state)["a"].sum())(own)
    assert float(slopes["0"]["scale"]) == pytest.approx(3 * 2 * float(PARAMS["a"].sum()))


def test_patterns_select_parameters_with_their_axes():
    assert selected(AXES, ("b/*",)) == {"b/c": ("embed", "mlp")}
    with pytest.raises(UserError, match="'c/\\*' matches no parameter"):
        selected(AXES, ("c/*",))
