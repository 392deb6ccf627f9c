"""The loss against a float64 computation from whole logits, and what it keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.jaxprs import largest

from slmjax.losses import pieces as module
from slmjax.losses.next_token import next_token

pytestmark = pytest.mark.fast

B, T, D, V = 3, 20, 8, 50


def unembed(params, hidden):
    return hidden.astype(jnp.float32) @ params["table"].T


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(V, D)), jnp.float32), "unused": jnp.ones(3)}
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) > 0.3), jnp.float32)
    return params, hidden, targets, weights


def exact(params, hidden, targets, weights, z_loss):
    """Loss, its parts, and its gradient by logits, in float64, from the definition."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["table"], np.float64).T
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    w = np.asarray(weights, np.float64) / np.asarray(weights, np.float64).sum()
    nll, squared = (w * (log_z - target)).sum(), (w * log_z**2).sum()
    p = np.exp(logits - log_z[..., None])
    gradient = w[..., None] * (p - np.eye(V)[np.asarray(targets)] + z_loss * 2 * log_z[..., None] * p)
    accuracy = (w * (logits.argmax(-1) == np.asarray(targets))).sum()
    return nll + z_loss * squared, nll, squared, accuracy, gradient


@pytest.mark.parametrize("chunk", [None, 1, 6, 20, 64])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_metrics_and_gradients_are_exact(case, chunk, z_loss):
    params, hidden, targets, weights = case
    loss, nll, squared, accuracy, by_logits = exact(params, hidden, targets, weights, z_loss)

    def f(p, h):
        return next_token(unembed, p, h, targets, weights, z_loss=z_loss, chunk=chunk)

    (value, metrics), (dp, dh) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, hidden)
    assert value == pytest.approx(loss, rel=2e-6)
    assert metrics["loss"] == pytest.approx(nll, rel=2e-6)
    assert metrics["z_loss"] == pytest.approx(squared, rel=2e-6)
    assert metrics["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert metrics["weight"] == pytest.approx(float(np.asarray(weights, np.float64).sum()), rel=1e-6)
    np.testing.assert_allclose(dh, by_logits @ np.asarray(params["table"], np.float64), rtol=0, atol=2e-7)
    by_table = np.einsum("btv,btd->vd", by_logits, np.asarray(hidden, np.float64))
    np.testing.assert_allclose(dp["table"], by_table, rtol=0, atol=1e-6)
    assert not dp["unused"].any()


@pytest.mark.parametrize("chunk", [None, 6])
def test_no_weight_gives_zero_and_no_gradient(case, chunk):
    params, hidden, targets, weights = case

    def f(p):
        return next_token(unembed, p, hidden, targets, weights * 0, z_loss=1.0, chunk=chunk)

    (value, metrics), gradient = jax.value_and_grad(f, has_aux=True)(params)
    assert float(value) == 0.0
    assert all(float(m) == 0.0 for m in metrics.values())
    assert not gradient["table"].any()


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("bad", [1e30, np.inf, np.nan])
def test_positions_without_weight_may_hold_anything(case, chunk, bad):
    params, hidden, targets, weights = case
    spoiled = jnp.where(weights[..., None] == 0, bad, hidden)
    assert bool((spoiled != hidden).any())
    clean = next_token(unembed, params, hidden, targets, weights, chunk=chunk)[0]
    assert float(next_token(unembed, params, spoiled, targets, weights, chunk=chunk)[0]) == float(clean)


def test_chunks_never_hold_all_logits():
    b, t, d, v, chunk = 4, 64, 16, 5000, 8
    params = {"table": jnp.ones((v, d))}
    hidden, targets, weights = jnp.ones((b, t, d)), jnp.zeros((b, t), jnp.int32), jnp.ones((b, t))

    def step(size):
        return jax.grad(lambda p, h: next_token(unembed, p, h, targets, weights, chunk=size)[0], argnums=(0, 1))

    assert largest(step(t), params, hidden) == b * t * v
    assert largest(step(chunk), params, hidden) == b * chunk * v

    def temporary(size):
        return jax.jit(step(size)).lower(params, hidden).compile().memory_analysis().temp_size_in_bytes

    assert temporary(t) >= 4 * b * t * v
    assert temporary(chunk) < 4 * b * t * v / 2


def test_gradients_of_the_table_add_up_in_float32():
    """With a bfloat16 table inside the model, the sum over many chunks is still a float32 sum."""
    n, v, d = 512, 4, 2
    params = {"table": jnp.zeros((v, d))}
    hidden = jnp.full((1, n, d), 1.0 + 1 / 128)
    targets, weights = jnp.zeros((1, n), jnp.int32), jnp.ones((1, n))

    def coarse(p, h):
        return (h.astype(jnp.bfloat16) @ p["table"].astype(jnp.bfloat16).T).astype(jnp.float32)

    gradient = jax.grad(lambda p: next_token(coarse, p, hidden, targets, weights, chunk=1)[0] * n)(params)["table"]
    expected = -n * 0.75 * (1 + 1 / 128)  # a bfloat16 sum of 512 such terms stalls at 256 of the smallest step
    assert float(gradient[0, 0]) == pytest.approx(expected, rel=1e-2)
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize(
    ("batch", "length", "vocab"), [(8, 512, 8192), (8, 512, 49152), (64, 2048, 128256), (1, 1, 10**9)]
)
def test_the_automatic_size_keeps_to_its_bounds(batch, length, vocab):
    size = module._chunk(batch, length, vocab)
    assert 1 <= size <= length
    assert size == 1 or batch * size <= max(module.MAX_LOGITS // vocab, module.MIN_TOKENS)
    assert size == length or batch * (2 * size + 1) > max(
        module.MAX_LOGITS // vocab, module.MIN_TOKENS
    )  # no smaller than need be


def test_automatic_chunking_happens_in_a_large_case():
    b, t, d, v = 2, 4096, 4, 50_000
    shapes = ({"table": jax.ShapeDtypeStruct((v, d), jnp.float32)}, jax.ShapeDtypeStruct((b, t, d), jnp.float32))
    targets, weights = jnp.zeros((b, t), jnp.int32), jnp.ones((b, t))
    assert largest(lambda p, h: next_token(unembed, p, h, targets, weights)[0], *shapes) <= module.MIN_TOKENS * v
