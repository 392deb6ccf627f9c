"""Floats of 4 bits: values, scales and gradients against casts of ml_dtypes and closed forms in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.compress.ptq.gptq import gptq
from slmjax.compress.ptq.rtn import least_error, nearest
from slmjax.compress.quant.blocks import Blocks, PerGroup
from slmjax.compress.quant.float4 import MXFP4, NVFP4, Float4, e4m3, power_of_two, scale_of_matrix
from slmjax.compress.quant.grids import decoded
from slmjax.errors import UserError

pytestmark = pytest.mark.fast

AXES, SHAPE = ("layers", "embed", "mlp"), (2, 64, 6)
QUANTIZERS = {
    "MX": MXFP4(),
    "MX even": MXFP4(exponent="even"),
    "MX ceil": MXFP4(exponent="ceil"),
    "NV": NVFP4(),
}


def rounded_to(dtype, x):
    return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def by_definition(quantizer, w):
    """Blocks [.., groups, size, out] of each matrix -> values, scales, and where the gradient passes, in float64."""
    size = 16 if isinstance(quantizer, NVFP4) else 32
    w = np.asarray(w, np.float64).reshape(2, -1, size, w.shape[-1])
    most = np.abs(w).max(axis=2, keepdims=True)
    if isinstance(quantizer, NVFP4):
        of_matrix = 2.0 ** np.ceil(np.log2(most.max(axis=(1, 3), keepdims=True) / 6 / 448))
        scale = rounded_to(ml_dtypes.float8_e4m3fn, most / 6 / of_matrix) * of_matrix
    else:
        exponent = {
            "floor": lambda x: np.floor(np.log2(x)) - 2,
            "even": lambda x: np.floor(np.log2(x / 1.75)) - 1,
            "ceil": lambda x: np.ceil(np.log2(x / 6)),
        }[quantizer.exponent](most)
        scale = 2.0**exponent
    v = w / scale
    value = rounded_to(ml_dtypes.float4_e2m1fn, np.clip(v, -6, 6)) * scale
    return value, scale, np.abs(v) < 7


def cut(quantizer, w):
    return quantizer.granularity.cut(w.shape, AXES, "layers/mlp/up")


def random(seed=0, size=0.05):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=SHAPE) * size * rng.uniform(0.1, 3, (2, 64, 1))).astype(np.float32)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_scales_and_gradients(name):
    quantizer, w, g = QUANTIZERS[name], random(), random(1)
    blocks = cut(quantizer, w)
    value, scale, passes = by_definition(quantizer, w)
    found, back = jax.vjp(jax.jit(lambda w: quantizer.fake(w, blocks)), jnp.asarray(w))
    np.testing.assert_array_equal(np.asarray(found).reshape(value.shape), value.astype(np.float32))
    (of_w,) = back(jnp.asarray(g))
    np.testing.assert_array_equal(np.asarray(of_w).reshape(passes.shape), g.reshape(passes.shape) * passes)
    assert np.all(passes) == (name != "MX"), "only the exponent of the specification clips"
    codes = jax.jit(lambda w: quantizer.pack(w, blocks))(jnp.asarray(w))
    np.testing.assert_array_equal(2 * np.asarray(codes.steps), scale[:, :, 0])
    assert set(np.unique(codes.codes)) <= set(Float4().codes)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_packed_codes_give_the_trained_values_bit_for_bit(name):
    quantizer = QUANTIZERS[name]
    whole = np.round(random() * 100) / 8  # ties
    for w in (random(), 0 * random(), whole, random(size=1e-7), random(size=1e5), np.full(SHAPE, -0.25, np.float32)):
        blocks = cut(quantizer, w)
        found = jax.jit(lambda w, blocks=blocks: quantizer.fake(w, blocks))(jnp.asarray(w))
        values = decoded(quantizer.pack(jnp.asarray(w), blocks), quantizer.grid, blocks)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), values.view(np.uint32))
        np.testing.assert_array_equal(values, rounded_to(ml_dtypes.bfloat16, values), "exact in bfloat16")


@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=50))
@settings(deadline=None, max_examples=10)
def test_the_nearest_number_and_of_two_the_even_one(values):
    x = np.array([*values, *np.arange(-16, 16, 0.125)], np.float32)
    wanted = rounded_to(ml_dtypes.float4_e2m1fn, np.clip(x / 2, -6, 6)) * 2
    np.testing.assert_array_equal(jax.jit(Float4().encode)(x), wanted)


def test_all_scales_of_8_bits():
    x = np.concatenate([np.arange(0, 500, 0.0625), np.arange(0, 3, 2.0**-12)]).astype(np.float32)
    wanted = np.maximum(rounded_to(ml_dtypes.float8_e4m3fn, np.minimum(x, 448)), 2.0**-9)
    np.testing.assert_array_equal(jax.jit(e4m3)(x), wanted)
    y = np.array([1, 1.75, 1.5, np.nextafter(np.float32(2), np.float32(0)), 0.0, 3e-39], np.float32)
    np.testing.assert_array_equal(power_of_two(y), [1, 1, 1, 1, 2.0**-100, 2.0**-100])
    np.testing.assert_array_equal(power_of_two(y[:4], 2**23 - 1), [1, 2, 2, 2])


def test_the_scale_of_a_matrix_is_found_again():
    for seed, size in enumerate((1e-6, 0.05, 300)):
        w = random(seed, size)
        steps = np.asarray(NVFP4().pack(jnp.asarray(w), cut(NVFP4(), w)).steps)
        for layer in steps:
            scale = scale_of_matrix(layer)
            assert np.frexp(scale)[0] == 0.5
            np.testing.assert_array_equal(rounded_to(ml_dtypes.float8_e4m3fn, 2 * layer / scale), 2 * layer / scale)
            assert 224 < 2 * layer.max() / scale <= 448
    assert scale_of_matrix(np.array([1, 1.03], np.float32)) is None
    assert scale_of_matrix(np.array([1, 2.0**-20], np.float32)) is None, "beyond the range of E4M3"
    assert scale_of_matrix(np.zeros(2, np.float32)) is None


@pytest.mark.parametrize("name", ["MX ceil", "NV"])
def test_a_search_and_gptq_keep_to_scales_of_the_format(name):
    quantizer, w = QUANTIZERS[name], random()
    blocks = cut(quantizer, w)
    plain = decoded(nearest(quantizer, jnp.asarray(w), blocks), quantizer.grid, blocks)
    found = nearest(quantizer, jnp.asarray(w), blocks, least_error)
    searched = decoded(found, quantizer.grid, blocks)
    assert np.square(searched - w).sum() < np.square(plain - w).sum()
    size = quantizer.granularity.size
    x = np.random.default_rng(5).normal(size=(256, 64)) @ np.random.default_rng(6).normal(size=(64, 64))
    codes, steps, _ = gptq(quantizer, w[0].T, x.T @ x, size)
    ours = np.repeat(steps, size, axis=1) * codes
    one = Blocks((64, 6), (64 // size, size, 6), (1,), size)
    rtn = decoded(nearest(quantizer, jnp.asarray(w[0]), one), quantizer.grid, one).T
    lost = [np.square(x @ (v - w[0].T).T).sum() for v in (ours, rtn)]
    assert lost[0] < 0.8 * lost[1]
    for some in (*np.asarray(found.steps), steps):
        fits = (np.frexp(some)[0] == 0.5).all() if name != "NV" else scale_of_matrix(some) is not None
        assert fits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MXFP4(granularity=PerGroup(size=16)), r"granularity is .*16.*, but MXFP4 has a scale for each 32"),
        (lambda: NVFP4(scale_type="float16"), "scale_type is 'float16', but NVFP4 has scales of E4M3; leave it out"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_gptq_finds_scales_of_one_unit_where_blocks_are_zero_or_small():
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(16, 128)) * np.geomspace(1, 1e-3, 128)).astype(np.float32)
    w[:, 32:64], w[3] = 0, 0
    x = rng.normal(size=(400, 128)) @ rng.normal(size=(128, 128))
    codes, steps, _ = gptq(NVFP4(), w, x.T @ x, 16)
    assert scale_of_matrix(steps) is not None
    plain = np.asarray(NVFP4().fake(jnp.asarray(w), Blocks(w.shape, (16, 8, 16), (2,))))
    errors = [np.square(x @ (y - w).T).sum() for y in (np.repeat(steps, 16, axis=1) * codes, plain)]
    assert errors[0] < 0.8 * errors[1]
