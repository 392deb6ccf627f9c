"""AWQ: factors that cancel out in every family, the searches against NumPy, and a model that loses less by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import VOCAB, batch, logits, parameters, tiny_gpt2, tiny_llama

from slmjax import tree
from slmjax.compress.ptq import awq
from slmjax.compress.quant.blocks import PerGroup, PerTensor
from slmjax.compress.quant.grids import decoded
from slmjax.compress.quant.uniform import Asymmetric, Symmetric
from slmjax.compress.quant.view import Rule, chosen
from slmjax.errors import UserError
from slmjax.models.families.apple import two_blocks
from slmjax.models.families.bloom import bloom
from slmjax.models.families.common.llama_like import Sizes
from slmjax.models.families.gemma2 import gemma2
from slmjax.models.families.gpt_neox import gpt_neox
from slmjax.models.families.lfm2 import lfm2
from slmjax.models.families.olmo2 import olmo2
from slmjax.models.families.opt import opt
from slmjax.models.families.phi3 import phi3
from slmjax.models.families.stablelm import stablelm
from slmjax.models.rescaling import exchanges
from slmjax.nn.block import NormedStream, PostNorm
from slmjax.nn.position import Rope
from slmjax.runs.calibrating import grams
from slmjax.runs.quantizing import AWQ, RTN, silent

RNG = np.random.default_rng
SIZES = Sizes(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=VOCAB, context=64)
ROPE, SMALL = Rope(theta=1e4), {"layers": 2, "width": 32, "heads": 4, "vocab": VOCAB, "context": 64}
OF_NORMS, OF_MATRICES = {"attn_norm", "mlp_norm"}, {"attn/v", "mlp/up"}
FAMILIES = {
    "llama": (tiny_llama(layers=2), [OF_NORMS | OF_MATRICES] * 2),
    "gemma2": (gemma2(SIZES, position=ROPE, windows=(8, None)), [OF_NORMS | OF_MATRICES] * 2),
    "gpt2": (tiny_gpt2(layers=2), [OF_NORMS | {"attn/v"}] * 2),
    "gpt_neox": (gpt_neox(**SMALL), [OF_NORMS | {"attn/v"}] * 2),
    "opt": (opt(**SMALL), [OF_NORMS | OF_MATRICES] * 2),
    "opt without gains": (opt(**SMALL, affine=False), [OF_MATRICES] * 2),
    "opt with norms after": (opt(**SMALL, wiring=PostNorm), [OF_MATRICES] * 2),
    "bloom, stream normed": (bloom(**SMALL, wiring=NormedStream), [{"attn/v"}] * 2),
    "phi3": (phi3(SIZES, position=ROPE), [OF_NORMS | OF_MATRICES] * 2),
    "stablelm, parallel": (
        stablelm(SIZES, position=ROPE, qkv_bias=True, parallel=True), [{"attn_norm"} | OF_MATRICES] * 2,
    ),
    "olmo2": (olmo2(SIZES, position=ROPE), [OF_MATRICES] * 2),
    "lfm2": (
        lfm2(attends=(False, True), width=32, heads=4, kv_heads=2, hidden=48, vocab=VOCAB, context=64, conv_bias=True),
        [{"conv_norm", "conv/c", "mlp_norm", "mlp/up"}, OF_NORMS | OF_MATRICES],
    ),
    "shared keys and values": (
        two_blocks(first=2, second=1, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, vocab=VOCAB, context=64),
        [OF_NORMS | OF_MATRICES, OF_NORMS | {"mlp/up"}, OF_NORMS | {"mlp/up"}],
    ),
}  # fmt: skip
COMPUTED = "llama", "gemma2", "gpt2", "gpt_neox", "opt", "stablelm, parallel", "lfm2", "shared keys and values"
"""Those that differ in how a factor is applied"""


def close(a, b):
    assert np.abs(b).max() > 0.5
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def same_program(decoder, *models):
    """The logits of models with different parameters."""
    b, model = batch(documents=2), decoder.build()
    run = jax.jit(lambda params: logits(model, params, b), compiler_options={"xla_backend_optimization_level": 0})
    return [run(jax.tree.map(jnp.asarray, params)) for params in models]


def test_where_each_family_can_exchange_factors():
    for decoder, sources in FAMILIES.values():
        assert [{e.source for e in exchanges(block)} for block in decoder.blocks()] == sources


@pytest.mark.parametrize("name", COMPUTED)
def test_any_factors_leave_the_logits_as_they_are(name):
    decoder, _ = FAMILIES[name]
    model = decoder.build()
    params = parameters(decoder, model)
    new = {path: np.array(x) for path, x in tree.flatten(params).items()}
    for seed, place in enumerate(decoder.places()):
        within = f"{place.path}/"
        for i, exchange in ((i, e) for i in range(len(place.numbers)) for e in exchanges(place.block)):
            layer = {path.removeprefix(within): x[i] for path, x in new.items() if path.startswith(within)}
            source = layer[f"{exchange.source}/scale"] if exchange.norm else layer[exchange.source][0]
            factors = np.exp(RNG(seed).uniform(-1.5, 1.5, source.size)).astype(np.float32)
            for path, x in exchange.apply(layer, factors).items():
                assert np.abs(x - layer[path]).max() > 1e-2
                new[within + path][i] = x
    close(*same_program(decoder, tree.unflatten(new), params))


def rtn(w, step, low, high):
    """Rounding to nearest in NumPy, the steps as float16 holds them."""
    step = np.float32(step).astype(np.float16).astype(np.float32)
    return step * np.clip(np.round(w / step), low, high)


def error(gram, d):
    return np.einsum("oi,ij,oj->o", d, gram, d)


def correlated(width, seed=0):
    """A Gram matrix, and the mean size of each channel: a few are large."""
    x = RNG(seed).normal(size=(256, width)) @ RNG(seed + 1).normal(size=(width, width)) * np.geomspace(8, 0.1, width)
    return x.T @ x, np.abs(x).mean(axis=0)


@pytest.mark.parametrize("group", [None, 8])
def test_the_factors_are_those_of_the_power_with_the_least_error(group):
    gram, sizes = correlated(24)
    ws = [RNG(i).normal(size=(12, 24)).astype(np.float32) for i in (5, 6)]
    matrices = [awq.Matrix(Symmetric(bits=3), w, group) for w in ws]
    found = awq.best_factors(matrices, gram, sizes, lambda s: s)
    errors, tried = [], []
    for power in np.arange(21) / 20:
        s = sizes**power
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        total = 0.0
        for w in ws:
            blocked = (w * s).reshape(12, -1, group or 24)
            values = rtn(blocked, np.abs(blocked).max(axis=2, keepdims=True) / 3, -4, 3).reshape(12, 24)
            total += error(gram, values / s - w).sum()
        errors.append(total)
        tried.append(s)
    best = int(np.argmin(errors))
    assert best > 0
    assert errors[best] < 0.95 * errors[0]
    np.testing.assert_allclose(found, tried[best], rtol=1e-5)


def test_channels_that_are_never_seen_keep_finite_factors():
    s = awq.factors(np.array([0.0, 1.0, 2.0]), 1.0)
    assert np.isfinite(s).all()
    assert (s > 0).all()


def test_clipping_takes_the_scale_with_the_least_output_error():
    gram, _ = correlated(16)
    w = RNG(0).standard_t(2, size=(32, 16)).astype(np.float32)
    codes, steps, zeros = awq.clipped(awq.Matrix(Symmetric(bits=3), w, None), gram)
    assert zeros is None
    usual = np.abs(w).max(axis=1, keepdims=True) / 3
    tried = np.stack([error(gram, rtn(w, usual * f, -4, 3) - w) for f in 1 - np.arange(11) / 20])
    np.testing.assert_allclose(error(gram, steps * codes - w), tried.min(axis=0), rtol=1e-2)
    assert np.mean(tried.argmin(axis=0) > 0) > 0.3  # of the output channels are clipped


@pytest.mark.parametrize("quantizer", [Symmetric(bits=3), Asymmetric(bits=3)], ids=lambda q: type(q).__name__)
def test_clipping_of_groups_never_raises_the_error_of_an_output_channel(quantizer):
    gram, _ = correlated(32)
    w = RNG(0).standard_t(2, size=(48, 32)).astype(np.float32)
    matrix = awq.Matrix(quantizer, w, 8)
    codes, steps, zeros = (
        a if a is None else np.repeat(a, 32 // a.shape[1], axis=1) for a in awq.clipped(matrix, gram)
    )
    plain = decoded(quantizer.pack(w, matrix.blocks), quantizer.grid, matrix.blocks)
    ours = error(gram, steps * (codes - (0 if zeros is None else zeros)) - w)
    theirs = error(gram, plain - w)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.95 * theirs.sum()


@pytest.mark.parametrize("name", ["llama", "stablelm, parallel"])
def test_every_matrix_has_at_most_the_error_of_rounding(name):
    """Errors of outputs, in the units of the original model, on the calibration data."""
    decoder, _ = FAMILIES[name]
    params = parameters(decoder, decoder.build())
    batches = (batch(rows=8), batch(rows=8, seed=1))
    quantizer = Symmetric(bits=3, granularity=PerGroup(size=16))
    rules = (Rule(quantizer=quantizer),)
    found = grams(decoder, params, batches)
    scaled = AWQ().scaled(decoder, params, chosen(decoder.axes(), rules), found)
    close(*same_program(decoder, scaled.params, params))
    ours, theirs = (method(decoder, params, rules, batches, silent) for method in (AWQ(), RTN()))
    flat, full = (tree.flatten(p) for p in (params, scaled.params))
    lower = 0
    for path, packed in ours.packed.items():
        for i, gram in enumerate(found.of(path)):
            s = scaled.factors[path][i]
            w, w_scaled, q = (
                np.asarray(x[i], np.float64).reshape(len(gram), -1).T for x in (flat[path], full[path], packed.values())
            )
            rows = (w * s / w_scaled).mean(axis=1, keepdims=True)  # by which an output channel was divided
            plain = np.asarray(theirs.packed[path].values()[i], np.float64).reshape(len(gram), -1).T
            mine, rounding = error(gram, q * rows / s - w).sum(), error(gram, plain - w).sum()
            assert mine <= rounding * (1 + 1e-3), path
            lower += mine < 0.9 * rounding
    assert lower > len(ours.packed) / 2


def test_a_scale_for_a_whole_matrix_is_refused():
    decoder = tiny_llama()
    rules = (Rule(quantizer=Symmetric(granularity=PerTensor())),)
    with pytest.raises(UserError, match="a scale for each channel or group"):
        AWQ()(decoder, parameters(decoder, decoder.build()), rules, (batch(),), silent)
