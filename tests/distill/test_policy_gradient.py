"""The policy gradient, in float64 and without chance: its mean over every possible sample is the exact gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance.test_invariance import QUICK

from slmjax.distill.policy_gradient import importance, rewards_to_come, surrogate, token_rewards
from slmjax.losses.divergences import ReverseKL, mixture

V, T, END = 3, 3, 2
SAMPLES = np.array(list(itertools.product(range(V), repeat=T)))
CONTEXTS = np.array([[0, 1 + y[0], 1 + V + V * y[0] + y[1]] for y in SAMPLES])
"""The row of a table of next-token logits [1 + V + V * V, V] that each token is drawn from"""


def complete():
    """Every sample has T tokens: which of them exist, and whether the sample counts."""
    return np.ones(SAMPLES.shape, bool), np.ones(len(SAMPLES))


def until_the_end():
    """A sample ends with its first END. Of those that differ only after it, one counts."""
    ended = np.cumsum(SAMPLES == END, axis=1) - (SAMPLES == END) > 0
    return ~ended, np.all(~ended | (SAMPLES == 0), axis=1).astype(float)


@functools.cache
def compiled():
    def log_probs(table):
        return jax.nn.log_softmax(table)[CONTEXTS]  # [samples, T, V]

    def drawn(each):
        return jnp.take_along_axis(each, SAMPLES[..., None], axis=-1)[..., 0]

    def exact(student, teacher, exists, counts, share):
        q, p = (jnp.sum(jnp.where(exists, drawn(log_probs(x)), 0.0), axis=1) for x in (student, teacher))
        return jnp.sum(counts * jnp.exp(q) * (q - p))

    def estimated(student, teacher, exists, counts, share, leads):
        all_q, all_p = log_probs(student), log_probs(teacher)
        log_q, log_p = drawn(all_q), drawn(all_p)
        behind = drawn(mixture(all_p, all_q, share))
        probability = counts * jnp.exp(jnp.sum(jnp.where(exists, behind, 0.0), axis=1))
        weights = jnp.cumprod(importance(log_p, log_q, share), axis=1)  # the exact ones, also of later tokens
        rewards = weights * token_rewards(log_p, log_q, 1e9)
        to_come = leads * rewards_to_come(rewards, exists, normalise=False) / weights
        each = jnp.where(exists, surrogate(ReverseKL()(all_p, all_q), log_q, to_come, weights), 0.0)
        return jnp.sum(jax.lax.stop_gradient(probability) * jnp.sum(each, axis=1))

    def both(*args):
        *shared, leads = args
        return jax.grad(exact)(*shared), jax.grad(estimated)(*shared, leads)

    return jax.jit(both, compiler_options=QUICK)


@pytest.mark.parametrize("samples", [complete, until_the_end])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_mean_over_all_samples_is_the_exact_gradient(samples, share):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 1 + V + V * V, V))
    with jax.enable_x64(True):
        args = student, teacher, *samples(), np.float64(share)
        wanted, found = jax.device_get(compiled()(*args, 1.0))
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)
        _, blind = jax.device_get(compiled()(*args, 0.0))
        assert np.abs(blind - wanted).max() > 0.01, "the next step alone is another gradient"


def test_rewards_and_weights_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    log_p, log_q = np.log(rng.random((2, 4, 7)))
    log_p[0, 3], log_q[1, 3] = -np.inf, -np.inf
    sampled = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0], [0] * 7, [1] * 7], bool)
    with jax.enable_x64(True):
        p, q, at = map(jnp.asarray, (log_p, log_q, sampled))
        rewards, weights = token_rewards(p, q, 2.0), importance(p, q, 0.2)
        sums, means = (rewards_to_come(rewards, at, normalise=x) for x in (False, True))
        rewards, weights, sums, means = map(np.asarray, (rewards, weights, sums, means))
    assert rewards[0, 3] == -2, "the teacher excludes it"
    for row, t in np.ndindex(log_p.shape):
        p, q = np.exp(log_p[row, t]), np.exp(log_q[row, t])
        assert weights[row, t] == pytest.approx(q / (0.2 * p + 0.8 * q), rel=1e-12)
        if min(p, q) > 0:
            assert rewards[row, t] == pytest.approx(min(2, max(-2, np.log(p / q))), rel=1e-12)
        later = [rewards[row, s] for s in range(t + 1, 7) if sampled[row, s]]
        assert sums[row, t] == pytest.approx(sum(later), abs=1e-12)
        assert means[row, t] == pytest.approx(sum(later) / max(1, len(later)), abs=1e-12)
