"""Activations and key-value caches in few bits: closed forms, gradients, and the model that computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.compress.quant.activations import Dynamic, RoundedInputs, Static, summed
from slmjax.compress.quant.cache import RoundedCache, apart, pairs
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics

pytestmark = pytest.mark.fast

MODEL = llama(layers=2, width=32, heads=2, kv_heads=1, hidden=48, vocab=64, context=32, tied=True)
RNG = np.random.default_rng(0)


def logits(numerics, tokens):
    model = MODEL.build(Compute(), numerics)
    params = model.init(jax.random.key(0))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = model.apply(params, tokens, positions, jnp.ones_like(tokens))
    return np.asarray(model.unembed(params, out.hidden))


TOKENS = jnp.asarray(RNG.integers(0, 64, (2, 12)), jnp.int32)


@pytest.mark.parametrize(
    ("equation", "of_x", "dimensions"),
    [("btd,df->btf", 3, (2,)), ("bthk,hkd->btd", 4, (2, 3)), ("...d,vd->...v", 3, (2,)), ("...d,vd->...v", 2, (1,))],
)
def test_a_scale_is_shared_by_what_the_product_sums_over(equation, of_x, dimensions):
    assert summed(equation, of_x) == dimensions


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_token_by_token(bits):
    x, w = RNG.normal(size=(2, 5, 8)).astype(np.float32), RNG.normal(size=(8, 3)).astype(np.float32)
    product = RoundedInputs(bits=bits)
    found = product("layers/mlp/up", "btd,df->btf", jnp.asarray(x), jnp.asarray(w), jnp.einsum)
    most = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis=-1, keepdims=True) / most
    wanted = np.einsum("btd,df->btf", np.round(x / scale) * scale, w)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # the result for a token does not depend on the other tokens of the batch
    alone = product("layers/mlp/up", "btd,df->btf", jnp.asarray(x[:1, 2:3]), jnp.asarray(w), jnp.einsum)
    np.testing.assert_allclose(found[:1, 2:3], alone, rtol=1e-6, atol=1e-6)


def test_gradients_pass_straight_through():
    x, w = jnp.asarray(RNG.normal(size=(1, 4, 8)), jnp.float32), jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)

    def total(product):
        return lambda x, w: product("layers/mlp/up", "btd,df->btf", x, w, jnp.einsum).sum()

    of_x, of_w = jax.grad(total(RoundedInputs()), argnums=(0, 1))(x, w)
    plain_x, _ = jax.grad(total(Numerics().product), argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(of_x, plain_x)
    scale = jnp.abs(x).max(axis=-1, keepdims=True) / 127
    np.testing.assert_allclose(of_w, (jnp.round(x / scale) * scale).sum(axis=(0, 1))[:, None].repeat(3, 1), rtol=1e-4)


def test_a_fixed_scale_for_each_parameter():
    x, w = jnp.asarray(RNG.normal(size=(1, 4, 8)), jnp.float32), jnp.ones((8, 1))
    product = RoundedInputs(scale=Static(largest=(("layers/mlp/up", 1.0),)))
    found = product("layers/mlp/up", "btd,df->btf", x, w, jnp.einsum)
    wanted = np.clip(np.round(np.asarray(x) * 127), -128, 127).sum(axis=-1, keepdims=True) / 127
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="has no value for layers/mlp/down"):
        product("layers/mlp/down", "btd,df->btf", x, w, jnp.einsum)


def test_only_products_inside_the_layers_are_rounded():
    x, w = jnp.asarray(RNG.normal(size=(1, 4, 8)), jnp.float32), jnp.ones((5, 8))
    found = RoundedInputs(bits=2)("embed/table", "btd,vd->btv", x, w, jnp.einsum)
    np.testing.assert_array_equal(found, jnp.einsum("btd,vd->btv", x, w))


def test_a_model_in_eight_bits_is_near_and_in_four_bits_farther():
    plain = logits(Numerics(), TOKENS)
    error = {bits: np.abs(logits(Numerics(product=RoundedInputs(bits=bits)), TOKENS) - plain).max() for bits in (4, 8)}
    assert 0 < error[8] < 0.05 * np.abs(plain).max()
    assert error[8] < error[4]


def generated(codec, tokens):
    """Logits of the tokens one by one, with a cache."""
    model = MODEL.build(Compute(), Numerics(cache=codec))
    params = model.init(jax.random.key(0))
    cache, out = model.init_cache(len(tokens), 16), []

    @jax.jit
    def step(cache, token, position):
        result = model.apply(params, token, position, jnp.ones_like(token), cache=cache)
        return result.cache, model.unembed(params, result.hidden)

    for i in range(tokens.shape[1]):
        cache, here = step(cache, tokens[:, i : i + 1], jnp.full((len(tokens), 1), i, jnp.int32))
        out.append(here[:, 0])
    return np.stack(out, axis=1), cache


def test_a_cache_in_few_bits():
    plain = logits(Numerics(), TOKENS)
    error = {}
    for bits in (8, 4):
        found, cache = generated(RoundedCache(bits=bits), TOKENS)
        error[bits] = np.abs(found - plain).max() / np.abs(plain).max()
        codes = cache.layers[0][0]["k"]["codes"]
        assert codes.dtype == jnp.int8
        assert codes.size == 2 * 2 * 1 * 16 * 16 * bits // 8  # layers, batch, heads, slots, channels
    assert 0 < error[8] < 0.02
    assert error[8] < error[4] < 0.3


def test_what_is_read_is_the_nearest_value():
    codec = RoundedCache(bits=8)
    new = jnp.asarray(RNG.normal(size=(2, 3, 4, 8)), jnp.float32)  # [B, T, G, K]
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), codec.init(2, 4, 5, 8, "float32"))
    read = codec.read(codec.write(stack, new, jnp.int32(1), jnp.int32(2)), jnp.int32(1), jnp.float32)
    scale = np.abs(new).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(read[:, 2:] - new) <= scale * 0.51)
    assert not np.any(read[:, :2])


def test_two_codes_share_a_byte():
    codes = jnp.asarray(RNG.integers(-8, 8, (3, 10)), jnp.int8)
    assert pairs(codes).shape == (3, 5)
    np.testing.assert_array_equal(apart(pairs(codes)), codes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoundedInputs(bits=1), "numerics.product.bits is 1"),
        (lambda: RoundedCache(bits=2), "numerics.cache.bits is 2"),
        (lambda: RoundedCache(bits=4).init(1, 1, 4, 7, "float32"), "a head has 7 channels"),
        (lambda: Static()("w", jnp.ones(2), (0,), 127), "there are: none"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_dynamic_scale_of_zeros_is_not_zero():
    assert np.all(Dynamic()("w", jnp.zeros((1, 2, 4)), (2,), 127) > 0)
