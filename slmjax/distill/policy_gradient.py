"""The gradient of a sequence's reverse KL divergence, estimated from sampled tokens: pure functions of each token's
log-probabilities.

Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.2. For y drawn from a policy, q the student and p the teacher, the
gradient of KL(q || p) over whole sequences is the mean of

    sum over t of  w_t * (grad KL(q(. | y_<t) || p(. | y_<t))  -  R_t+1 * grad log q(y_t | y_<t)),

    R_t+1 = sum over t' > t of r_t',    r_t = log p(y_t | y_<t) - log q(y_t | y_<t).

The first part is the exact gradient of the next step, with all tokens in place of the drawn one (the paper's "single
step decomposition"); the second is what the drawn token leads to. w_t is 1 if y is drawn from q itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_rewards(log_p: jax.Array, log_q: jax.Array, clip: float) -> jax.Array:
    """r of each token, in [-clip, clip]: also where the teacher excludes it (log-probability -inf).

    Args:
        log_p, log_q: log-probabilities of the token under teacher and student; float, any shape.
    """
    q = jnp.where(log_q > -jnp.inf, log_q, 0.0)
    return jax.lax.stop_gradient(jnp.clip(log_p - q, -clip, clip))


def rewards_to_come(rewards: jax.Array, sampled: jax.Array, *, normalise: bool) -> jax.Array:
    """R_t+1: of each token the sum of the rewards of the sampled tokens after it in its row.

    Args:
        rewards: [B, T].
        sampled: bool [B, T].
        normalise: whether the sum is divided by the number of its terms (the paper's length normalisation), since long
            samples have large sums, which favour short ones.
    """
    last_first = jnp.where(sampled, rewards, 0.0)[:, ::-1], sampled[:, ::-1].astype(rewards.dtype)
    upto = [jnp.cumsum(jnp.pad(x[:, :-1], ((0, 0), (1, 0))), axis=1)[:, ::-1] for x in last_first]
    return upto[0] / jnp.maximum(upto[1], 1.0) if normalise else upto[0]


def importance(log_p: jax.Array, log_q: jax.Array, teacher_share: float) -> jax.Array:
    """w of each token: q / (teacher_share * p + (1 - teacher_share) * q), at most 1 / (1 - teacher_share).

    The exact weight of a token is the product over the tokens up to it (in R, up to each later token), whose variance
    grows with t; the paper keeps this factor alone, which is biased.
    """
    # 1 / (1 - share + share * p / q): also finite where one of the two is 0.
    q = jnp.where(log_q > -jnp.inf, log_q, 0.0)
    weights = 1.0 / (1.0 - teacher_share + teacher_share * jnp.exp(log_p - q))
    return jax.lax.stop_gradient(jnp.where(log_q > -jnp.inf, weights, 0.0))


def surrogate(next_step: jax.Array, log_q: jax.Array, to_come: jax.Array, weights: jax.Array) -> jax.Array:
    """Values whose gradient is each token's term of the estimate.

    Args:
        next_step: KL(q || p) over the next token at each position, with its gradient; any shape.
        log_q: the student's log-probability of the drawn token, with its gradient.
        to_come: R_t+1.
        weights: w_t.
    """
    log_q = jnp.where(log_q > -jnp.inf, log_q, 0.0)
    to_come, weights = jax.lax.stop_gradient((to_come, weights))
    return weights * (next_step - to_come * log_q)
