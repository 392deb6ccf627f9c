"""Reductions of logits agree with numpy, values of every sign and size, equal ones and infinities included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.losses.logits import BLOCK, at, exponentials, largest, likeliest

SIZES = (1, BLOCK - 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK + 77)


def logits(vocab: int, seed: int = 0) -> np.ndarray:
    """Rounded, so that many are equal."""
    return np.round(4 * np.random.default_rng(seed).normal(size=(3, 5, vocab))).astype(np.float32)


@pytest.mark.parametrize("vocab", SIZES)
def test_likeliest_is_the_first_of_the_largest(vocab):
    for seed in range(5):
        x = logits(vocab, seed)
        assert np.array_equal(jax.jit(likeliest)(x), x.argmax(-1))
        assert np.array_equal(jax.jit(largest)(x), x.max(-1))


@pytest.mark.parametrize("vocab", SIZES)
def test_each_position_can_be_the_likeliest(vocab):
    x = np.zeros((vocab, vocab), np.float32) + 7 * np.eye(vocab, dtype=np.float32)
    assert np.array_equal(likeliest(jnp.asarray(x)), np.arange(vocab))


def test_infinities_and_nan():
    x = np.full((3, 3 * BLOCK + 1), -np.inf, np.float32)
    x[1, -1] = 0
    x[2, 200] = np.nan
    assert np.array_equal(likeliest(jnp.asarray(x)), x.argmax(-1))
    assert np.array_equal(largest(jnp.asarray(x)), x.max(-1), equal_nan=True)
    powers, total, log_total = exponentials(jnp.asarray(x[:2]), largest(jnp.asarray(x[:2])))
    assert np.array_equal(powers, np.exp(x[:2]))
    assert np.array_equal(total, [0, 1])
    assert np.array_equal(log_total, [-np.inf, 0])


def test_at_is_a_gather_whose_gradient_is_one_at_the_target():
    x, targets = logits(11), np.array([[0, 10, 3, 3, 5]] * 3)
    value, gradient = jax.value_and_grad(lambda x: (at(x, jnp.asarray(targets)) * jnp.arange(5)).sum())(jnp.asarray(x))
    hit = np.arange(11) == targets[..., None]
    assert value == (x[hit].reshape(3, 5) * np.arange(5)).sum()
    assert np.array_equal(gradient, hit * np.arange(5)[:, None])


@pytest.mark.parametrize("target", [-1, -100, 11, 2**30])
def test_at_of_a_target_that_is_no_token_is_zero(target):
    x = jnp.asarray(logits(11))
    value, gradient = jax.value_and_grad(lambda x: at(x, jnp.full((3, 5), target)).sum())(x)
    assert value == 0
    assert not gradient.any()


def test_exponentials_are_finite_for_large_logits():
    x = jnp.asarray(logits(300) * 1e4)
    powers, total, log_total = exponentials(x, largest(x))
    assert np.isfinite(powers).all()
    assert (total >= 1).all()
    assert np.allclose(log_total, jax.nn.logsumexp(x, axis=-1), rtol=1e-6)
