"""muP, CompleteP and Complete(d)P: the published table, the base itself, gradients and steps at other sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.test_one_step import packed

from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.errors import UserError
from slmjax.models.assembly import is_declared
from slmjax.models.families.bert import bert
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.lfm2 import lfm2
from slmjax.models.families.llama import llama
from slmjax.models.measures import roles
from slmjax.models.parametrisation import SP, CompletedP, CompleteP, Module, MuP
from slmjax.nn.attention import QKNorm
from slmjax.nn.block import NormedStream, PostNorm
from slmjax.nn.compute import Compute
from slmjax.nn.embedding import Logits
from slmjax.nn.initial import Normal
from slmjax.nn.norm import RMSNorm
from slmjax.objectives import NextToken
from slmjax.optim.recipes import Adafactor, AdamW, Lion, Muon
from slmjax.optim.schedules import Constant
from slmjax.serialise import from_json, to_json
from slmjax.tree import flatten
from slmjax.types import Factors

pytestmark = pytest.mark.fast

VOCAB = 61


def small(width=16, layers=2, hidden=None, head_dim=8, **fields):
    sizes = {"layers": layers, "width": width, "heads": width // 8, "kv_heads": width // 16, "head_dim": head_dim}
    return llama(**sizes, hidden=hidden or 3 * width, vocab=VOCAB, context=32, **{"tied": False, **fields})


BASE = small()
LARGE = small(width=64, layers=8, hidden=256)  # 4 times the width, 4 times the depth, 16/3 times the hidden channels
MATRICES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up")
GPT2 = gpt2(layers=2, width=16, heads=2, vocab=VOCAB, context=32)
TABLES = ("embed/table", "unembed/table")


def values(model):
    """Initial values of one layer's matrices, and of the tables, without a model being run."""
    return {
        path: model.initial(role)[0](jax.random.key(0), role.shape, jnp.float32) for path, role in roles(model).items()
    }


def factors(parametrisation, model, optimizer=AdamW()):  # noqa: B008
    model = parametrisation.model(model)
    return model, model.initial.factors(model, optimizer.step_norms)


@pytest.mark.parametrize(
    ("kind", "m_l", "alpha"),
    [(MuP(base=BASE), 1, 1.0), (CompleteP(base=BASE), 4, 1.0), (CompleteP(base=BASE, alpha=0.5), 4, 0.5)],
    ids=["muP", "CompleteP", "alpha 0.5"],
)
def test_the_table_of_the_paper(kind, m_l, alpha):
    """Dey et al. 2025, table 1, for m_N = 4 and m_L = 4; `down` by its own inputs."""
    model, found = factors(kind, LARGE)
    depth, eps = m_l ** (alpha - 1), 1 / (4 * m_l**alpha)
    block = model.pattern[0]
    assert (block.branch_scale, model.logits.scale, block.mixer.scale) == (m_l**-alpha, 1 / 4, None)
    for name in MATRICES:
        assert found[f"layers/{name}"] == pytest.approx(Factors(depth / 4, 4.0, eps))
    assert found["layers/mlp/down"] == pytest.approx(Factors(depth * 48 / 256, 256 / 48, eps))
    for name in ("attn_norm", "mlp_norm"):
        assert found[f"layers/{name}/scale"] == pytest.approx(Factors(depth, 1.0, eps))
    assert not {*TABLES, "final_norm/scale"} & set(found)


def test_initial_values_follow_the_inputs_of_each_matrix():
    model = CompleteP(base=replace(BASE, initial=Normal(std=0.25))).model(LARGE)
    drawn = values(model)
    branch = 0.25 / np.sqrt(2 * BASE.layers)  # of the base: the multiplier of branches takes the place of 1/sqrt(2L)
    expected = dict.fromkeys(TABLES, 0.25) | {f"layers/{name}": 0.25 / 2 for name in MATRICES}
    expected |= {"layers/attn/o": branch / 2, "layers/mlp/down": branch * np.sqrt(48 / 256)}
    for path, std in expected.items():
        assert float(drawn[path].std()) == pytest.approx(std, rel=0.05), path
    mup = MuP(base=replace(BASE, initial=Normal(std=0.25))).model(LARGE)
    deeper = values(mup)["layers/attn/o"]
    assert float(deeper.std()) == pytest.approx(0.25 / np.sqrt(2 * 8) / 2, rel=0.05)


def test_wider_heads_divide_scores_by_their_width():
    model = MuP(base=BASE).model(small(head_dim=32))
    assert model.pattern[0].mixer.rule.scale == pytest.approx(8**0.5 / 32)
    assert SP(base=BASE).model(small(head_dim=32)).pattern[0].mixer.rule.scale == pytest.approx(32**-0.5)


def test_multipliers_of_the_base_are_kept():
    """Those of tables do not depend on sizes; the others are multiplied."""
    base, large = (gpt2(layers=n, width=w, heads=w // 8, vocab=VOCAB, context=32) for n, w in ((2, 16), (4, 64)))
    (block,), position = base.pattern, base.position
    base = replace(
        base, pattern=(replace(block, branch_scale=0.5),), embed_scale=3.0, position=replace(position, scale=2.0),
        logits=Logits(scale=5.0),
    )  # fmt: skip
    model = CompleteP(base=base).model(large)
    assert (model.embed_scale, model.position.scale) == (3.0, 2.0)
    assert (model.logits.scale, model.pattern[0].branch_scale) == (5 / 4, 0.25)
    plain = SP(base=base).model(model)
    assert (plain.logits, plain.pattern[0].branch_scale, plain.initial) == (Logits(scale=5.0), 0.5, Normal())


def test_numbers_may_be_traced():
    def spread(std, factor):
        kind = CompletedP(
            base=replace(BASE, initial=Normal(std=std)), modules=(Module(pattern="*/q", rate=factor, initial=factor),)
        )
        model, found = factors(kind, LARGE)
        return values(model)["layers/attn/q"].std(), found["layers/attn/q"].rate

    found = jax.vmap(spread)(jnp.array([0.1, 0.2]), jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(found[0], [0.05, 0.3], rtol=0.05)
    np.testing.assert_allclose(found[1], [0.25, 0.75])


def test_the_base_itself_is_the_standard_model_bit_for_bit():
    for kind in (MuP, CompleteP, CompletedP):
        model, found = factors(kind(base=BASE), BASE)
        assert replace(model, initial=Normal()) == replace(BASE, initial=Normal())
        assert found == {}  # so the program of a step is the same, too
        jax.tree.map(np.testing.assert_array_equal, values(model), values(BASE))


def test_all_models_of_a_kind_have_a_base():
    """Convolutions, biases, gains of queries and keys, tables of positions, tied tables, several stages."""
    sizes = {"vocab": VOCAB, "context": 32}
    pairs = (
        [gpt2(layers=n, width=w, heads=w // 8, **sizes) for n, w in ((2, 16), (4, 64))],
        [
            lfm2(attends=(False, True) * n, width=w, heads=w // 8, kv_heads=w // 16, hidden=2 * w, **sizes)
            for n, w in ((1, 16), (2, 64))
        ],
    )
    for base, large in pairs:
        model, found = factors(CompletedP(base=base), large)
        axes = flatten(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
        assert set(found) == set(axes)  # epsilon at least
        assert all(f.weight_decay == 1 for path, f in found.items() if path.endswith(("_bias", "/scale", "/taps")))
        vectors = {path: f.rate for path, f in found.items() if len(axes[path]) - ("layers" in axes[path]) == 1}
        assert set(vectors.values()) == {1.0}
    assert found["layers/0/conv/taps"].rate == 1
    assert found["layers/0/conv/out"].rate == 1 / 4


def test_muon_scales_by_the_sides_of_each_matrix():
    """The spectral norm of a step, lr * sqrt(longer side), is to be lr * sqrt(outputs / inputs)."""
    _, found = factors(CompleteP(base=BASE), LARGE, Muon(not_muon=("layers/attn/v",)))

    def rate(inputs, outputs):
        return (outputs / inputs / max(inputs, outputs)) ** 0.5

    sides = {"attn/q": (64, 64, 16, 16), "attn/k": (64, 32, 16, 8), "mlp/down": (256, 64, 48, 16)}
    for name, (i, o, base_i, base_o) in sides.items():
        wider = rate(i, o) / rate(base_i, base_o)
        assert found[f"layers/{name}"][:2] == pytest.approx((wider, 1 / wider)), name
    assert found["layers/attn/v"].rate == 1 / 4  # under Adam
    assert factors(CompleteP(base=BASE), LARGE, Lion())[1] == factors(CompleteP(base=BASE), LARGE)[1]
    with pytest.raises(UserError, match="optimizer Adafactor: no rule is known"):
        factors(MuP(base=BASE), LARGE, Adafactor())


def test_decay_by_the_square_root_of_the_width():
    """Fan et al. 2025, arXiv:2510.15262."""
    _, found = factors(MuP(base=BASE, decay_power=0.5), LARGE)
    assert found["layers/attn/q"][:2] == (1 / 4, 2.0)


def test_each_kind_of_parameter_has_numbers_of_its_own():
    modules = (Module(pattern="*/attn/q", rate=3.0, initial=2.0, weight_decay=0.5), Module(pattern="embed/*", eps=7.0))
    model, found = factors(CompletedP(base=BASE, modules=modules), LARGE)
    assert found["layers/attn/q"] == pytest.approx(Factors(3 / 4, 2.0, 1 / 16))
    assert found["embed/table"] == pytest.approx(Factors(1.0, 1.0, 7 / 4))
    assert float(values(model)["layers/attn/q"].std()) == pytest.approx(0.02, rel=0.05)  # 2 * 0.02 / sqrt(4)
    with pytest.raises(UserError, match=r"modules: 'attn/z' matches no parameter"):
        factors(CompletedP(base=BASE, modules=(Module(pattern="attn/z"),)), LARGE)


def normed(model):
    (block,) = model.pattern
    return replace(model, pattern=(replace(block, mixer=replace(block.mixer, qk_norm=QKNorm(norm=RMSNorm()))),))


def gradient_sizes(model):
    """The root mean square of each gradient, at values far enough from zero."""
    made = model.build(Compute(dtype="float32", unroll=1))
    params = jax.jit(made.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, packed(VOCAB))
    loss = NextToken().build(made).loss
    grads = jax.jit(jax.grad(lambda p: loss(p, (), batch, jax.random.key(1))[0]))(params)
    return {path: float(jnp.sqrt(jnp.mean(jnp.square(g)))) for path, g in flatten(grads).items()}


def test_epsilon_follows_the_size_of_gradients():
    """Four times as wide, twice as deep: every gradient is as much smaller as its epsilon. Gradients of gains that
    heads share are sums over heads, which at initial values add up like noise: smaller than they are later."""
    base, large = (normed(small(width=w, layers=n, hidden=2 * w)) for w, n in ((16, 2), (64, 4)))
    base = replace(base, initial=Normal(std=0.25))
    model, found = factors(CompletedP(base=base), large)
    ours, theirs = gradient_sizes(model), gradient_sizes(base)
    assert found["layers/attn/q_norm/scale"].eps == 1 / 2  # does not shrink with the width
    for path in ours:
        ratio = ours[path] / theirs[path] / found[path].eps
        assert (0.25 if path.endswith(("q_norm/scale", "k_norm/scale")) else 0.5) < ratio < 2, path


def test_one_step_moves_each_parameter_by_its_own_factors():
    """The optimizer beside a closed form: the first step of Adam, with an epsilon that shows."""
    model, found = factors(CompletedP(base=BASE), LARGE)
    axes, lr, decay, eps = model.axes(), 0.01, 0.3, 1e-2
    params = jax.tree.map(lambda p: jnp.full(p.value.shape, 0.3), model.declared(), is_leaf=is_declared)
    optimizer = AdamW(weight_decay=decay, eps=eps, clip_norm=None)
    tx = optimizer.build(lambda step: lr, axes, {}, found)
    grads = jax.tree.map(lambda p: 0.1 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    decayed, moved, before = flatten(optimizer.decayed(axes)), flatten(updates), flatten(params)
    for path, g in flatten(grads).items():
        f = found[path]
        direction = g / (jnp.abs(g) + eps * f.eps) + decayed[path] * decay * f.weight_decay * before[path]
        np.testing.assert_allclose(moved[path], -lr * f.rate * direction, rtol=1e-4, atol=1e-8, err_msg=path)


def experiment(model):
    data = PackedText(train=(Part(source="nowhere"),), batch=8, length=16)
    return Experiment(name="x", model=model, data=data, schedule=Constant(peak_lr=1e-2), steps=3)


def test_it_is_part_of_the_model_and_a_wrong_multiplier_is_refused():
    model = CompletedP(base=BASE, modules=(Module(pattern="embed/*", rate=2.0),)).model(LARGE)
    assert model.initial.model(model) == model
    assert from_json(to_json(experiment(model))) == experiment(model)
    with pytest.raises(UserError, match=r"model.pattern.0.branch_scale is 0.25, but CompletedP demands 0.125 of"):
        experiment(replace(model, repeats=16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MuP(base=bert(layers=1, width=16, heads=2, hidden=24, vocab=61, context=32)), "base is an Encoder"),
        (lambda: MuP(base=MuP(base=BASE).model(LARGE)), "base is itself scaled by MuP"),
        (lambda: CompleteP(base=BASE, alpha=0.2), r"alpha is 0\.2; expected 0\.5 to 1"),
        (lambda: factors(MuP(base=BASE), GPT2), "it has no parameter"),
        (lambda: CompleteP(base=post(2)).model(post(4)), "PostNorm norms the residual stream itself"),
        (lambda: CompleteP(base=post(2, NormedStream)).model(post(4, NormedStream)), "NormedStream norms the residual"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def post(layers, kind=PostNorm):
    (block,) = BASE.pattern
    return replace(BASE, pattern=(kind(mixer=block.mixer, mlp=block.mlp, norm=block.norm),), repeats=layers)
