"""Each optimizer against numpy; clipping, decay masks, matrices of stacked layers, sharding, and that they train."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optim import reference

from slmjax import tree
from slmjax.errors import UserError
from slmjax.models.families.bert import bert
from slmjax.models.families.lfm2 import lfm2
from slmjax.optim.recipes import Adafactor, AdamW, Lion, Muon, OptimizerSpec, ScheduleFreeAdamW, matrix
from slmjax.optim.schedules import WSD, Constant, Cosine, InverseSqrt

pytestmark = pytest.mark.fast

L, D, H, K, F, V = 3, 8, 2, 4, 16, 11
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "attn": {
            "q": ("layers", "embed", "heads", "head_dim"),
            "k": ("layers", "embed", "kv_heads", "head_dim"),
            "o": ("layers", "heads", "head_dim", "embed"),
            "q_bias": ("layers", "heads", "head_dim"),
        },
        "attn_norm": {"scale": ("layers", "embed")},
        "mlp": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
    },
    "final_norm": {"scale": ("embed",)},
}
SIZES = {"vocab": V, "embed": D, "layers": L, "heads": H, "kv_heads": 1, "head_dim": K, "mlp": F}
FLAT = tree.flatten(AXES, is_leaf=lambda x: isinstance(x, tuple))
VECTORS = {"layers/attn/q_bias", "layers/attn_norm/scale", "final_norm/scale"}
ALL = [AdamW, Muon, Lion, Adafactor, ScheduleFreeAdamW]
SCHEDULE = Constant(peak_lr=0.02)


def params_like(rng):
    return {path: rng.normal(size=[SIZES[a] for a in axes]) for path, axes in FLAT.items()}


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    return params_like(rng), [params_like(rng) for _ in range(5)]


def train(recipe, start, grads, schedule=SCHEDULE, axes=AXES):
    """-> (stored, evaluated) parameters by path."""
    optimizer = recipe.build(schedule.build(len(grads)), axes)
    params = as_tree(start)
    state = jax.jit(optimizer.init)(params)
    for g in grads:
        updates, state = jax.jit(optimizer.update)(as_tree(g), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return tree.flatten(params), tree.flatten(optimizer.evaluate(state, params))


def as_tree(flat):
    return jax.tree.map(jnp.float32, tree.unflatten(flat))


def layers(path, start, grads):
    """A parameter, one layer at a time as a matrix, with its gradients; and where it goes."""
    m = matrix(FLAT[path])
    for i in range(L) if FLAT[path][0] == "layers" else [...]:
        shape = (-1,) if m is None else (int(np.prod([start[path].shape[d] for d in m.rows])), -1)
        yield i, start[path][i].reshape(shape), [g[path][i].reshape(shape) for g in grads]


def expect(got, start, grads, step, rtol=2e-5):
    """`step(path, p, grads)` gives what each layer of each parameter should be."""
    for path in FLAT:
        for i, p, gs in layers(path, start, grads):
            want = step(path, p, gs).reshape(got[path][i].shape)
            np.testing.assert_allclose(got[path][i], want, rtol=rtol, atol=rtol, err_msg=path)


def test_matrices_of_stacked_parameters():
    got = {path: matrix(axes) for path, axes in FLAT.items()}
    assert {path for path, m in got.items() if m is None} == VECTORS
    assert got["layers/attn/q"] == ((1,), (2, 3))
    assert got["layers/attn/o"] == ((1, 2), (3,))
    assert got["layers/mlp/down"] == ((1,), (2,))
    assert got["embed/table"] == ((0,), (1,))


def test_adamw(run):
    schedule = Cosine(peak_lr=0.02, warmup_steps=2)
    lr = [float(schedule.build(5)(t)) for t in range(5)].__getitem__
    got, evaluated = train(AdamW(clip_norm=None, weight_decay=0.3, b2=0.9), *run, schedule=schedule)
    assert evaluated is not None
    expect(got, *run, lambda path, p, g: reference.adamw(p, g, lr, 0.0 if path in VECTORS else 0.3, 0.9, 0.9, 1e-8))
    assert all(np.array_equal(got[path], evaluated[path]) for path in FLAT)


def test_lion(run):
    got, _ = train(Lion(clip_norm=None, weight_decay=0.3), *run)
    expect(
        got, *run, lambda path, p, g: reference.lion(p, g, lambda t: 0.02, 0.0 if path in VECTORS else 0.3, 0.9, 0.99)
    )


def test_muon(run):
    got, _ = train(Muon(clip_norm=None, weight_decay=0.3, not_muon=("*/mlp/up",)), *run)

    def step(path, p, g):
        if path in VECTORS | {"embed/table", "layers/mlp/up"}:
            return reference.adamw(p, g, lambda t: 0.02, 0.0 if path in VECTORS else 0.3, 0.9, 0.95, 1e-8)
        return reference.muon(p, g, lambda t: 0.02, 0.3, 0.95, 5, 0.2)

    expect(got, *run, step, rtol=2e-4)


SMALL = {"width": 16, "heads": 2, "hidden": 24, "vocab": 29, "context": 16}


@pytest.mark.parametrize(
    ("model", "apart"),
    [
        (bert(layers=1, **SMALL), {"embed/table", "embed/positions", "embed/types"}),
        (lfm2(attends=(False, True), kv_heads=1, **SMALL), {"embed/table", "layers/0/conv/taps"}),
    ],
    ids=["bert", "lfm2"],
)
def test_muon_leaves_to_adam_what_is_looked_up_and_what_convolves(model, apart):
    rng, params = np.random.default_rng(0), tree.flatten(model.build().init(jax.random.key(0)))
    grads = [{path: rng.normal(size=p.shape) for path, p in params.items()} for _ in range(2)]
    plain = {"weight_decay": 0.0, "clip_norm": None}
    by_muon, by_adam = (
        train(recipe, params, grads, axes=model.axes())[0]
        for recipe in (Muon(**plain), AdamW(b1=0.9, b2=0.95, eps=1e-8, **plain))
    )
    axes = tree.flatten(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    same = {path for path in params if np.allclose(by_muon[path], by_adam[path], rtol=1e-5)}
    assert same == apart | {path for path in params if matrix(axes[path]) is None}


def test_muon_moves_every_layer_along_a_nearly_orthogonal_matrix(run):
    start, grads = run
    got, _ = train(Muon(clip_norm=None, weight_decay=0.0), start, grads[:1], Constant(peak_lr=1.0))
    for path in ("layers/attn/q", "layers/attn/k", "layers/attn/o", "layers/mlp/up", "layers/mlp/down"):
        for i, p, g in layers(path, start, grads[:1]):
            moved = (p - np.float64(got[path][i]).reshape(p.shape)) / (0.2 * np.sqrt(max(p.shape)))
            u, _, v = np.linalg.svd(g[0], full_matrices=False)
            assert np.all(np.abs(np.linalg.svd(moved, compute_uv=False) - 1) < 0.5)
            assert np.sum(moved * (u @ v)) > 0.75 * min(p.shape)  # close to the nearest orthogonal matrix


@pytest.mark.parametrize("smallest", [4, 10])
def test_adafactor(run, smallest):
    """Smaller than both sides: factored; else not."""
    got, _ = train(Adafactor(clip_norm=None, weight_decay=0.1, min_factored=smallest), *run)

    def step(path, p, g):
        factored = p.ndim == 2 and min(p.shape) >= smallest
        return reference.adafactor(p, g, lambda t: 0.02, 0.0 if path in VECTORS else 0.1, 0.8, 1.0, factored)

    expect(got, *run, step)


def test_adafactor_keeps_rows_and_columns_only():
    axes = {"layers": {"q": ("layers", "embed", "heads", "head_dim")}}
    optimizer = Adafactor().build(SCHEDULE.build(1), axes)
    state = jax.eval_shape(optimizer.init, {"layers": {"q": jax.ShapeDtypeStruct((L, 128, 4, 64), jnp.float32)}})
    assert tree.count(state) < L * (128 + 4 * 64) + 4 * L


def test_schedule_free(run):
    """Training stands at y, evaluation at x."""
    stored, evaluated = train(ScheduleFreeAdamW(clip_norm=None, weight_decay=0.3), *run)

    def step(which):
        return lambda path, p, g: reference.schedule_free_adamw(
            p, g, lambda t: 0.02, 0.0 if path in VECTORS else 0.3, 0.9, 0.95, 1e-8
        )[which]

    expect(stored, *run, step(0))
    expect(evaluated, *run, step(1), rtol=1e-4)
    assert not np.allclose(stored["embed/table"], evaluated["embed/table"], atol=1e-4)


@pytest.mark.parametrize(
    "schedule", [Cosine(peak_lr=1.0), WSD(peak_lr=1.0, warmup_steps=5), InverseSqrt(peak_lr=1.0, warmup_steps=5)]
)
def test_schedule_free_refuses_a_decay(schedule):
    with pytest.raises(UserError, match="schedule decays"):
        ScheduleFreeAdamW().build(schedule.build(100), AXES)


@pytest.mark.parametrize("schedule", [Constant(peak_lr=1.0, warmup_steps=7), Cosine(peak_lr=1.0, final_fraction=1.0)])
def test_schedule_free_takes_a_warmup(schedule):
    jax.jit(lambda p: ScheduleFreeAdamW().build(schedule.build(100), AXES).init(p))(as_tree(params_like(np.random)))


@pytest.mark.parametrize("norm", [0.01, 3.0, 1e9])
def test_clipping_scales_all_gradients_by_the_global_norm(run, norm):
    start, (g, *_) = run
    length = np.sqrt(sum(np.sum(x * x) for x in g.values()))
    # Adam forgets the gradient's scale except through eps: a large one makes it show.
    clipped, _ = train(AdamW(clip_norm=norm, eps=1.0), start, [g])
    scaled, _ = train(AdamW(clip_norm=None, eps=1.0), start, [{k: x * min(1, norm / length) for k, x in g.items()}])
    for path in FLAT:
        np.testing.assert_allclose(clipped[path], scaled[path], rtol=1e-5, atol=1e-7)
    plain, _ = train(AdamW(clip_norm=None, eps=1.0), start, [g])
    assert (norm > length) == np.allclose(plain["embed/table"], clipped["embed/table"], atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_decay_masks(kind, run):
    start, (g, *_) = run
    decayed, _ = train(kind(weight_decay=0.5, no_decay=("embed/*",)), start, [g])
    plain, _ = train(kind(weight_decay=0.0), start, [g])
    for path in FLAT:
        spared = path in VECTORS or path == "embed/table"
        want = 0.0 if spared else 0.02 * 0.5 * start[path]
        if kind is ScheduleFreeAdamW:  # after one step x = z and so is y
            np.testing.assert_allclose(plain[path] - decayed[path], want, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(plain[path] - decayed[path], want, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("make", [AdamW(no_decay=("embd/*",)), Muon(not_muon=("embd/*",))])
def test_a_pattern_that_matches_nothing_is_named(make):
    with pytest.raises(UserError, match=r"'embd/\*' matches no parameter; the parameters are: embed/table"):
        make.build(SCHEDULE.build(1), AXES)


@pytest.mark.parametrize("mistake", [{"weight_decay": -0.1}, {"clip_norm": 0.0}])
def test_mistakes_are_named(mistake):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(mistake))} is"):
        AdamW(**mistake)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        (AdamW, {"b1": 1.0}), (AdamW, {"b2": 95.0}), (Lion, {"b2": -0.1}), (Muon, {"momentum": 1.0}),
        (Muon, {"adam_b2": np.nan}), (ScheduleFreeAdamW, {"b1": 0}),
    ],
)  # fmt: skip
def test_averages_that_keep_everything_or_nothing_are_named(kind, mistake):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(mistake))} is"):
        kind(**mistake)


@pytest.mark.parametrize("kind", ALL)
def test_sharded_as_unsharded(kind, run):
    """Every parameter split over 8 devices; gradients and state follow."""
    start, grads = run
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
    flat = {p: NamedSharding(mesh, PartitionSpec(*(rules.get(str(a)) for a in axes))) for p, axes in FLAT.items()}
    shardings = tree.unflatten(flat)
    optimizer = kind(weight_decay=0.1).build(SCHEDULE.build(5), AXES)
    update = jax.jit(optimizer.update, out_shardings=(shardings, None))

    params = jax.device_put(as_tree(start), shardings)
    state = jax.jit(optimizer.init)(params)
    for g in grads:
        updates, state = update(jax.device_put(as_tree(g), shardings), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    got, want = tree.flatten(optimizer.evaluate(state, params)), train(kind(weight_decay=0.1), *run)[1]
    for path in FLAT:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("kind", ALL)
def test_state_is_arrays_only(kind):
    optimizer = kind().build(SCHEDULE.build(5), AXES)
    state = optimizer.init(as_tree(params_like(np.random.default_rng(0))))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", ALL)
def test_state_and_parameters_can_be_donated(kind):
    optimizer = kind().build(SCHEDULE.build(5), AXES)
    start = as_tree(params_like(np.random.default_rng(0)))

    @jax.jit
    def init():
        return start, optimizer.init(start)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = init()
    for _ in range(2):
        params, state = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("recipe", [AdamW(), Muon(), Lion(), Adafactor(min_factored=4), ScheduleFreeAdamW()])
def test_it_trains_a_two_layer_classifier(recipe):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(256, D)))
    labels = jnp.argmax(x @ rng.normal(size=(D, V)) + jnp.tanh(x) @ rng.normal(size=(D, V)), axis=-1)
    axes = {"layers": {"mlp": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}},
            "unembed": {"table": ("vocab", "embed")}, "norm": {"scale": ("embed",)}}  # fmt: skip
    shapes = {"layers/mlp/up": (2, D, 32), "layers/mlp/down": (2, 32, D), "unembed/table": (V, D), "norm/scale": (D,)}
    params = as_tree({path: 0.3 * rng.normal(size=shape) for path, shape in shapes.items()})

    def loss(p):
        hidden = x
        for i in range(2):
            hidden = hidden + jax.nn.relu(hidden @ p["layers"]["mlp"]["up"][i]) @ p["layers"]["mlp"]["down"][i]
        logits = (hidden * (1 + p["norm"]["scale"])) @ p["unembed"]["table"].T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    lr = {Lion: 3e-3, Adafactor: 3e-2}.get(type(recipe), 1e-2)
    optimizer = recipe.build(Constant(peak_lr=lr, warmup_steps=10).build(200), axes)

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=200)
    assert losses[0] > 2.0
    assert loss(optimizer.evaluate(state, params)) < 0.3


def test_recipes_are_values():
    assert AdamW() == AdamW()
    assert len({kind() for kind in ALL}) == len(ALL)
    assert all(issubclass(kind, OptimizerSpec) for kind in ALL)
    assert all(a != b for a, b in itertools.combinations([kind() for kind in ALL], 2))
