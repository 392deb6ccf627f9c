"""The view of quantization-aware training: which weights it rounds, when, and what it packs."""

import jax
import numpy as np
import pytest

from slmjax import tree
from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.grids import decoded
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW, Muon
from slmjax.optim.schedules import Constant
from slmjax.train import stored
from slmjax.train.sharding import Mesh
from slmjax.train.state import evaluation_params
from slmjax.train.step import program
from slmjax.types import Batch
from slmjax.views import EMA, Chain, Identity

pytestmark = pytest.mark.fast

MODEL = llama(layers=2, width=32, heads=2, kv_heads=1, hidden=48, vocab=64, context=16, tied=True).build()
KEY = jax.random.key(0)
LAYERS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


def batch(seed=0, rows=8, length=16):
    tokens = np.random.default_rng(seed).integers(0, 8, (rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape).copy()
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), ones.astype(np.float32), positions, ones)


def trained(view, steps, *, optimizer=AdamW(weight_decay=0.1), state=None, first=0, mesh=Mesh(data=1)):  # noqa: B008
    """State and built parts after some steps."""
    built = view.build(MODEL.axes)
    schedule = Constant(peak_lr=3e-3).build(100)
    tx = optimizer.build(schedule, *stored.optimized(MODEL.axes, built))
    devices = jax.devices()[:1] if mesh == Mesh(data=1) else jax.devices()
    run = program(MODEL.init, MODEL.axes, NextToken().build(MODEL), tx, built, mesh=mesh.build(devices))
    state = run.init() if state is None else state
    for step in range(first, steps):
        state, metrics = run.step(state, (), run.put(batch(step)))
        assert np.isfinite(metrics["loss"])
    return state, built, tx


def parts(state):
    params, own = stored.parts(state.params)
    return tree.flatten(params), tree.flatten(own)


def test_every_matrix_of_the_layers_and_nothing_else():
    view = Quantize(rules=(Rule(quantizer=Symmetric(bits=2)),)).build(MODEL.axes)
    params = MODEL.init(KEY)
    own, state = view.init(params, KEY)
    assert own == {}
    new = tree.flatten(view.apply(params, own, state))
    changed = {path for path, x in tree.flatten(params).items() if not np.array_equal(x, new[path])}
    assert changed == {f"layers/{name}" for name in LAYERS}
    assert all(len(np.unique(np.asarray(new["layers/mlp/up"])[0, :, i])) <= 4 for i in range(48))


def test_the_first_rule_that_matches_counts():
    rules = (
        Rule(quantizer=Symmetric(bits=8), patterns=("layers/attn/[qk]", "embed/table")),
        Rule(quantizer=LSQ(bits=4), patterns=("layers/attn/*",)),
        Rule(quantizer=Binary()),
    )
    view = Quantize(rules=rules).build(MODEL.axes)
    own, _ = view.init(MODEL.init(KEY), KEY)
    packed = view.pack(MODEL.init(KEY), own, view.init(MODEL.init(KEY), KEY)[1])
    levels = {path: p.grid.levels for path, p in packed.items()}
    assert levels["layers/attn/q"] == levels["embed/table"] == 256
    assert levels["layers/attn/v"] == levels["layers/attn/o"] == 16
    assert levels["layers/mlp/up"] == 2
    assert set(tree.flatten(own)) == {f"layers/{name}" for name in LAYERS} - {"layers/attn/q", "layers/attn/k"}


def test_a_row_of_a_table_is_a_channel():
    view = Quantize(rules=(Rule(quantizer=Symmetric(bits=8), patterns=("embed/table",)),)).build(MODEL.axes)
    params = MODEL.init(KEY)
    packed = view.pack(params, {}, view.init(params, KEY)[1])["embed/table"]
    most = np.abs(np.asarray(params["embed"]["table"])).max(axis=1)
    np.testing.assert_allclose(packed.codes.steps, most / 127, rtol=1e-3)


EACH = {
    "attn/q": LSQ(bits=3),
    "attn/k": SEQ(),
    "attn/v": SEQ(levels=3),
    "attn/o": Balanced(),
    "mlp/gate": Binary(),
    "mlp/up": BitNet(),
    "mlp/down": LSQ(granularity=PerGroup(size=8)),
}
"""A quantizer for each matrix of a layer"""
ALL = Quantize(rules=tuple(Rule(quantizer=q, patterns=(f"layers/{name}",)) for name, q in EACH.items()))


def test_training_moves_weights_and_scales_and_packs_what_it_computes_with():
    state, view, tx = trained(ALL, 4)
    before, after = tree.flatten(MODEL.init(jax.random.fold_in(KEY, 0))), parts(state)[0]
    for name, quantizer in EACH.items():
        assert np.mean(np.asarray(after[f"layers/{name}"] != before[f"layers/{name}"])) > 0.5, name
        if quantizer.learned:
            assert np.all(np.asarray(parts(state)[1][f"layers/{name}"]) != 0), f"a scale of {name} never moved"
    effective = tree.flatten(jax.jit(lambda state: evaluation_params(state, tx, view))(state))
    packed = evaluation_params(state, tx, view._replace(evaluate=view.pack))
    assert set(packed) == {f"layers/{name}" for name in LAYERS}
    for path, p in packed.items():
        np.testing.assert_array_equal(p.values(), effective[path])


def test_learned_scales_are_not_decayed_and_have_their_own_rate():
    view = Quantize(rules=(Rule(quantizer=SEQ()),), scale_rate=0.0)
    state, *_ = trained(view, 2)
    assert all(not np.any(x) for x in parts(state)[1].values())
    # a matrix of scales [groups, channels] is no matrix for Muon: it would make an orthogonal one of its momentum
    grouped = Quantize(rules=(Rule(quantizer=LSQ(granularity=PerGroup(size=8)), patterns=("layers/mlp/up",)),))
    state, *_ = trained(grouped, 1, optimizer=Muon(weight_decay=10.0))
    (own,) = parts(state)[1].values()
    assert np.all(own != 0)
    assert np.abs(own).max() <= 3e-3 * 1.001  # at most the first step of Adam, not decayed


def test_full_precision_first_then_rounded():
    """Until `start` a run is bit for bit that of full precision; then the scales are measured on its weights."""
    view = Quantize(rules=(Rule(quantizer=SEQ()),), start=3)
    plain, *_ = trained(Identity(), 3)
    state, built, tx = trained(view, 3)
    for path, x in tree.flatten(plain.params).items():
        np.testing.assert_array_equal(x, parts(state)[0][path])
    assert bool(state.view["begun"])
    weights = np.asarray(parts(state)[0]["layers/mlp/up"])
    np.testing.assert_allclose(2 * state.view["references"]["layers/mlp/up"], np.abs(weights).max(axis=1), rtol=1e-6)
    early, built_early, tx_early = trained(view, 2)
    assert evaluation_params(early, tx_early, built_early._replace(evaluate=built_early.pack)) == {}
    packed = evaluation_params(state, tx, built._replace(evaluate=built.pack))
    assert packed["layers/mlp/up"].grid.levels == 4
    later, *_ = trained(view, 5, state=state, first=3)
    assert all(np.any(np.asarray(x) != 0) for x in parts(later)[1].values())


def test_an_average_of_weights_and_scales_is_evaluated():
    view = EMA(decay=0.5, of=Quantize(rules=(Rule(quantizer=LSQ(bits=4)),)))
    state, built, tx = trained(view, 4)
    (average, own), _ = state.view
    shifted = any(not np.array_equal(x, parts(state)[1][path]) for path, x in tree.flatten(own).items())
    assert shifted, "the scales are averaged too"
    packed = evaluation_params(state, tx, built._replace(evaluate=built.pack))
    effective = tree.flatten(evaluation_params(state, tx, built))
    for path, p in packed.items():
        np.testing.assert_array_equal(p.values(), effective[path])
        near = decoded(p.codes, p.grid, p.blocks) - np.asarray(average[path])
        assert np.abs(near).mean() < np.abs(np.asarray(average[path])).mean() / 2


def test_a_chain_packs_what_its_last_view_rounds():
    rule = Rule(quantizer=Symmetric(bits=4))
    chained = Chain(views=(EMA(decay=0.9), Quantize(rules=(rule,))))
    state, built, tx = trained(chained, 1)
    packed = evaluation_params(state, tx, built._replace(evaluate=built.pack))
    effective = tree.flatten(evaluation_params(state, tx, built))
    for path, p in packed.items():
        np.testing.assert_array_equal(p.values(), effective[path])


def test_a_mesh_changes_nothing():
    view = Quantize(rules=(Rule(quantizer=LSQ(bits=4, granularity=PerGroup(size=8))),))
    alone, *_ = trained(view, 3)
    spread, *_ = trained(view, 3, mesh=Mesh(data=2, fsdp=2, tensor=2))
    for path, x in tree.flatten(alone.params).items():
        np.testing.assert_allclose(x, tree.flatten(spread.params)[path], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("share", "start"), [(1.0, 0), (0.25, 75), (0.001, 99)])
def test_a_share_of_the_run(share, start):
    rules = (Rule(quantizer=SEQ()),)
    views = (EMA(of=Quantize(rules=rules, share=share)), Chain(views=(Identity(), Quantize(rules=rules, share=share))))
    assert views[0].over(100).of.start == start
    assert views[1].over(100).views[1].start == start


def rounding(pattern):
    return Quantize(rules=(Rule(quantizer=Symmetric(bits=2), patterns=(pattern,)),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(rules=()), "view.rules is empty"),
        (lambda: Quantize(rules=(Rule(quantizer=SEQ(), patterns=("layers/attn/w",)),)).build(MODEL.axes), "matches no"),
        (
            lambda: Quantize(rules=(Rule(quantizer=SEQ(), patterns=("final_norm/*",)),)).build(MODEL.axes),
            "not a matrix",
        ),
        (lambda: Quantize(rules=(Rule(quantizer=SEQ()),), start=5).over(5), "view.start is 5, but the run has 5"),
        (lambda: Quantize(rules=(Rule(quantizer=SEQ()),), share=0.0), "view.share is 0"),
        (lambda: Quantize(rules=(Rule(quantizer=SEQ()),), share=0.5).build(MODEL.axes), "unknown number of steps"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
