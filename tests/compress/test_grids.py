"""Quantizers against closed forms in NumPy (float64): values, gradients of weights and of learned scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.compress.quant.blocks import PerChannel, PerGroup, PerTensor, sides
from slmjax.compress.quant.grids import SMALLEST, decoded, rounded, stored
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.errors import UserError

pytestmark = pytest.mark.fast

AXES = ("layers", "embed", "heads", "head_dim")
SHAPE = (2, 8, 2, 3)
QUANTIZERS = {
    **{f"symmetric{b}": Symmetric(bits=b) for b in range(2, 9)},
    **{f"filled{b}": Symmetric(bits=b, fill=True) for b in (2, 4, 8)},
    **{f"asymmetric{b}": Asymmetric(bits=b) for b in (1, 2, 4, 8)},
    **{f"lsq{b}": LSQ(bits=b) for b in (2, 3, 4, 8)},
    **{f"seq{n}": SEQ(levels=n) for n in (3, 4, 8, 16)},
    "balanced": Balanced(),
    "bitnet": BitNet(),
    "binary": Binary(),
}
GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(), "group": PerGroup(size=4)}


def weights(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 0.1


def with_granularity(quantizer, granularity, **changes):
    return dataclasses.replace(quantizer, granularity=granularity, **changes)


def expected(quantizer, w, s, z, g):
    """The definitions of the papers, by weight and step, in float64: value, gradient of w, gradient of s by weight.

    Written apart from the implementation, one case a quantizer.
    """
    v = w * (1 / s)
    match quantizer:
        case Symmetric(bits=b):
            n, p = 2 ** (b - 1), 2 ** (b - 1) - 1
            q = np.clip(np.round(v), -n, p)
            inside = (np.round(v) >= -n) & (np.round(v) <= p)
            return s * q, g * inside, None
        case Asymmetric(bits=b):
            q = np.clip(np.round(v) + z, 0, 2**b - 1)
            inside = (np.round(v) + z >= 0) & (np.round(v) + z <= 2**b - 1)
            return s * (q - z), g * inside, None
        case BitNet():
            return s * np.clip(np.round(v), -1, 1), g, None
        case LSQ(bits=b):
            n, p = 2 ** (b - 1), 2 ** (b - 1) - 1
            inside = (v >= -n) & (v <= p)
            q = np.round(np.clip(v, -n, p))
            return s * q, g * inside, g * np.where(inside, np.round(v) - v, np.where(v < 0, -n, p))
        case SEQ(levels=levels):
            n, h = levels / 2, (0.0 if levels % 2 else 0.5)
            alpha = s * n
            u = np.clip(v / n, -0.99, 0.99)
            q = (np.round(n * u - h) + h) / n  # value / alpha
            inside = np.abs(v / n) <= 0.99
            of_alpha = g * np.where(inside, q - w / alpha, q)
            return alpha * q, g * inside, of_alpha * n  # alpha = n s
        case Balanced():
            q = np.clip(np.floor(v), -2, 1) + 0.5
            inside = (np.floor(v) >= -2) & (np.floor(v) <= 1)
            return s * q, g * inside, g * np.where(inside, q - v, q)
        case Binary():
            alpha = s / 2
            sign = np.where(w >= 0, 1.0, -1.0)
            return alpha * sign, g * (np.abs(w) <= alpha), g * sign / 2  # alpha = s / 2


@pytest.mark.parametrize(
    ("name", "granularity"),
    [*((name, "group") for name in QUANTIZERS), *((n, g) for n in ("lsq3", "seq4") for g in ("tensor", "channel"))],
)
def test_values_and_gradients(name, granularity):
    quantizer = with_granularity(QUANTIZERS[name], GRANULARITIES[granularity], scale_type="float32")
    with jax.enable_x64(True):
        w, g = jnp.asarray(weights()), jnp.asarray(weights(seed=1))
        blocks = quantizer.granularity.cut(SHAPE, AXES, "layers/attn/q")
        blocked = w.reshape(blocks.blocked)
        reference = quantizer.reference(blocked, blocks) if quantizer.learned else None
        own = None if reference is None else jnp.full(blocks.scales, 0.1)

        def fake(w, own):
            step = quantizer.step(w.reshape(blocks.blocked), blocks, own, reference)
            zero = quantizer.zero(w.reshape(blocks.blocked), step, blocks)
            return rounded(quantizer.grid, w.reshape(blocks.blocked), step, zero, blocks.over), (step, zero)

        value, back, (step, zero) = jax.vjp(fake, w, own, has_aux=True)
        of_w, of_own = back(g.reshape(blocks.blocked))
        z = None if zero is None else np.asarray(zero)
        want = expected(quantizer, np.asarray(blocked), np.asarray(step), z, np.asarray(g).reshape(blocks.blocked))
        np.testing.assert_allclose(value, want[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(of_w.reshape(blocks.blocked), want[1], rtol=0, atol=1e-12)
        assert np.abs(of_w).sum() > 0
        if quantizer.learned:
            of_step = want[2].sum(axis=blocks.over)  # d step / d own = step / (1 + own)
            chained = of_step * np.asarray(step).reshape(blocks.scales) / 1.1 * quantizer.sensitivity(blocks)
            np.testing.assert_allclose(of_own, chained, rtol=1e-9, atol=1e-12)
            assert np.all(np.asarray(of_own) != 0), "a learned scale without a gradient never moves"


def test_initial_scales():
    """LSQ 2 mean|w| / sqrt(Qp), SEQ max|w|, binary and BitNet mean|w|, symmetric absmax / (2^(b-1) - 1)."""
    w = jnp.asarray(weights().astype(np.float32))
    blocks = PerChannel().cut(SHAPE, AXES, "layers/attn/q")
    mean, most = np.abs(w).mean(axis=1), np.abs(w).max(axis=1)
    np.testing.assert_allclose(LSQ(bits=3).reference(w, blocks), 2 * mean / np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(2 * SEQ(levels=4).reference(w, blocks), most, rtol=1e-5)  # alpha = 2 steps
    np.testing.assert_allclose(1.5 * SEQ(levels=3).reference(w, blocks), most, rtol=1e-5)
    np.testing.assert_allclose(Binary().reference(w, blocks) / 2, mean, rtol=1e-5)
    np.testing.assert_allclose(Symmetric(bits=4).base(w, blocks)[:, 0], most / 7, rtol=1e-6)
    np.testing.assert_allclose(Symmetric(bits=4, fill=True).base(w, blocks)[:, 0], most / 7.5, rtol=1e-6)
    whole = PerTensor().cut(SHAPE, AXES, "layers/attn/q")
    np.testing.assert_allclose(BitNet(eps=0.0).base(w, whole).ravel(), np.abs(w).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_balanced_begins_at_the_smallest_error():
    w = jnp.asarray(weights((64, 4)).astype(np.float32))
    blocks = PerChannel().cut(w.shape, ("embed", "mlp"), "layers/mlp/up")
    found = np.asarray(Balanced().reference(w, blocks))

    def error(f, column):
        s = f * np.abs(column).max() / 2
        return np.sum((s * (np.clip(np.floor(column / s), -2, 1) + 0.5) - column) ** 2)

    for column, f in zip(np.asarray(w).T, found, strict=True):
        assert error(f, column) <= min(error(k / 40, column) for k in range(1, 41)) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("name", "granularity", "scale_type"),
    [
        *((name, "group", "float16") for name in QUANTIZERS),
        *((name, granularity, "float32") for name in ("bitnet", "lsq4", "balanced") for granularity in GRANULARITIES),
        ("seq4", "channel", "bfloat16"),
    ],
)
def test_packed_codes_give_the_trained_values(name, granularity, scale_type):
    """dequant(pack(w)) == fake_quant(w), bit for bit, compiled or not; the steps fit their type."""
    quantizer = with_granularity(QUANTIZERS[name], GRANULARITIES[granularity], scale_type=scale_type)
    cases = edge_cases(SHAPE[1:])
    blocks = quantizer.granularity.cut(cases.shape, AXES, "layers/attn/q")
    own = reference = None
    if quantizer.learned:
        reference = jax.jit(lambda w: quantizer.reference(w, blocks))(cases.reshape(blocks.blocked))
        own = jnp.asarray(weights(blocks.scales, seed=2).astype(np.float32))
    fake = jax.jit(lambda w: quantizer.fake(w, blocks, own, reference))
    for w in (cases, *([cases.astype(jnp.bfloat16)] if name == "lsq4" else [])):
        codes = quantizer.pack(w, blocks, own, reference)
        values = decoded(codes, quantizer.grid, blocks)
        np.testing.assert_array_equal(np.asarray(fake(w)), values.astype(w.dtype))
    assert int(codes.codes.min()) >= quantizer.grid.low
    assert int(codes.codes.max()) <= quantizer.grid.high
    steps = np.asarray(codes.steps)
    assert steps.min() >= SMALLEST
    if scale_type == "float16":
        np.testing.assert_array_equal(steps, steps.astype(np.float16).astype(np.float32))


def edge_cases(shape):
    """[6, ...]: random weights, zeros, ties between values, equal weights, very small and large ones."""
    w = weights(shape).astype(np.float32)
    ties = np.round(w * 100) / 2 * 2.0**-4
    return jnp.asarray(np.stack([w, 0 * w, ties, np.full_like(w, -0.25), w * 1e-6, w * 1e4]), jnp.float32)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8),
    st.sampled_from([name for name, quantizer in QUANTIZERS.items() if not quantizer.learned]),
)
def test_rounding_is_no_farther_than_half_a_step(values, name):
    """A dynamic scale covers all weights of its block; with fill, also up to half a step beyond the last value."""
    quantizer = QUANTIZERS[name]
    w = jnp.asarray(np.array(values, np.float32).reshape(8, 1))
    blocks = with_granularity(quantizer, PerChannel()).granularity.cut((8, 1), ("embed", "mlp"), "layers/mlp/up")
    quantizer = with_granularity(quantizer, PerChannel())
    codes = quantizer.pack(w, blocks)
    error = np.abs(decoded(codes, quantizer.grid, blocks) - np.asarray(w))
    if isinstance(quantizer, BitNet):
        return
    step = np.asarray(codes.steps)
    assert np.all(error <= step * (0.5 + 0.5 * isinstance(quantizer, Asymmetric) + 2.0**-3) + 1e-6)


def test_a_block_of_zeros_stays_zero_or_as_small_as_the_smallest_step():
    for name, quantizer in QUANTIZERS.items():
        blocks = quantizer.granularity.cut(SHAPE, AXES, "layers/attn/q")
        zeros = jnp.zeros(SHAPE)
        own = jnp.zeros(blocks.scales) if quantizer.learned else None
        reference = quantizer.reference(zeros.reshape(blocks.blocked), blocks) if quantizer.learned else None
        value = quantizer.fake(zeros, blocks, own, reference)
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() <= SMALLEST, name


def test_binary_has_two_values_and_a_gradient():
    """A peer's 1-bit weights were all zero, with zero gradients, silently."""
    quantizer = Binary()
    blocks = quantizer.granularity.cut(SHAPE, AXES, "layers/attn/q")
    w = jnp.asarray(weights().astype(np.float32))
    reference = quantizer.reference(w, blocks)
    value, back = jax.vjp(lambda w: quantizer.fake(w, blocks, jnp.zeros(blocks.scales), reference), w)
    assert len(np.unique(np.asarray(value[0, :, 0, 0]))) == 2
    assert not np.any(np.asarray(value) == 0)
    assert np.count_nonzero(back(jnp.ones(SHAPE))[0]) > 0


def test_stored_is_what_a_16_bit_file_holds():
    steps = jnp.asarray(np.geomspace(2.0**-14, 100, 1000).astype(np.float32))
    np.testing.assert_array_equal(stored(steps, "float16"), np.asarray(steps).astype(np.float16).astype(np.float32))
    as_bfloat16 = np.asarray(steps.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(stored(steps, "bfloat16"), as_bfloat16)
    np.testing.assert_array_equal(stored(steps, "float32"), steps)
    np.testing.assert_array_equal(jax.grad(lambda s: stored(s, "float16").sum())(steps), np.ones(1000))


@pytest.mark.parametrize(
    ("axes", "shape", "inputs", "scales"),
    [
        (("layers", "embed", "heads", "head_dim"), (2, 8, 2, 3), (1,), (2, 2, 3)),
        (("layers", "heads", "head_dim", "embed"), (2, 2, 3, 8), (1, 2), (2, 8)),
        (("layers", "experts", "embed", "mlp"), (2, 4, 8, 6), (2,), (2, 4, 6)),
        (("vocab", "embed"), (32, 8), (1,), (32,)),
    ],
)
def test_a_channel_is_an_output_of_the_product(axes, shape, inputs, scales):
    assert sides(axes, "w").inputs == inputs
    blocks = PerChannel().cut(shape, axes, "w")
    assert blocks.scales == scales
    assert len(PerChannel().axes(axes, "w")) == len(scales)
    assert len(PerGroup(size=2).axes(axes, "w")) == len(PerGroup(size=2).cut(shape, axes, "w").scales)


def test_groups_are_consecutive_inputs():
    """The output projection's inputs are heads times head_dim, in the order of a Hugging Face weight [out, in]."""
    w = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    blocks = PerGroup(size=2).cut(w.shape, ("heads", "head_dim", "embed"), "layers/attn/o")
    theirs = w.reshape(6, 5).T.reshape(5, 3, 2)  # [out, groups, size]
    np.testing.assert_array_equal(w.reshape(blocks.blocked).max(axis=blocks.over).T, theirs.max(axis=2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PerGroup(size=3).cut(SHAPE, AXES, "layers/attn/q"), "does not divide the 8 input channels"),
        (lambda: PerGroup(size=0), "granularity.size is 0"),
        (lambda: PerChannel().cut((8,), ("embed",), "final_norm/scale"), "not a matrix"),
        (lambda: PerChannel().cut((2, 8, 3), ("layers", "mlp", "tap"), "layers/conv/taps"), "not a matrix"),
        (lambda: Symmetric(bits=9), "bits is 9"),
        (lambda: LSQ(bits=1), "bits is 1"),
        (lambda: SEQ(levels=2), "levels is 2"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(UserError, match=message):
        build()
