"""How far a student's distribution over the vocabulary is from a teacher's, in nats a token.

Every divergence is a function of one token's log-probabilities, exact where a probability is 0 (log-probability -inf,
such as a token that one of the two does not have): no nan in value or gradient. It is 0 where the two agree.

p is the teacher, q the student, both over the whole vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.losses.logits import exponentials


@dataclass(frozen=True, kw_only=True)
class Divergence(ABC):
    """A divergence of two distributions over the vocabulary."""

    @abstractmethod
    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        """Log-probabilities of teacher and student, each [..., V] -> nats [...]."""

    def of_logits(self, teacher: jax.Array, student: jax.Array, most: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The same of logits, each [..., V], and the maximum of both, each [...]; to be differentiated by the student's
        logits alone."""
        return self(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p || q): the student covers everything that the teacher finds likely. Hinton et al. 2015, arXiv:1503.02531."""

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        return kl(teacher, student)

    def of_logits(self, teacher: jax.Array, student: jax.Array, most: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _forward_kl(teacher, student, *most)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q || p): the student avoids what the teacher finds unlikely. Gu et al. 2023 (MiniLLM), arXiv:2306.08543.

    Where the teacher excludes tokens (p = 0 exactly) this would be infinite for any student. There q is renormalised
    over the other tokens, and -log(the mass that q gives to them) is added, which drives the excluded mass to 0.
    """

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        allowed = jnp.where(teacher > -jnp.inf, student, -jnp.inf)
        log_mass = jax.nn.logsumexp(allowed, axis=-1, keepdims=True)
        return kl(allowed - log_mass, teacher) - log_mass[..., 0]


@dataclass(frozen=True, kw_only=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    Agarwal et al. 2023 (GKD), arXiv:2306.13649, equation 1.

    It goes to 0 as beta goes to 0 or 1, so neither end is a KL divergence: use `ForwardKL` or `ReverseKL`.
    """

    beta: float = 0.5

    def __post_init__(self):
        if not 0 < self.beta < 1:
            raise UserError(
                f"JSD.beta: {self.beta} is not between 0 and 1, where the divergence is 0 for any student; use "
                "ForwardKL() or ReverseKL()"
            )

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        middle = mixture(teacher, student, self.beta)
        return self.beta * kl(teacher, middle) + (1 - self.beta) * kl(student, middle)


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|. Wen et al. 2023, arXiv:2307.15190."""

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.abs(jnp.exp(teacher) - jnp.exp(student)), axis=-1)


@dataclass(frozen=True, kw_only=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q): bounded by -log alpha. Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""

    alpha: float = 0.1

    def __post_init__(self):
        _check_alpha(self.alpha, "SkewKL", "ForwardKL")

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        return kl(teacher, mixture(teacher, student, self.alpha))


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q): bounded by -log alpha. Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""

    alpha: float = 0.1

    def __post_init__(self):
        _check_alpha(self.alpha, "SkewReverseKL", "ReverseKL")

    def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        return kl(student, mixture(student, teacher, self.alpha))


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) of log-probabilities [..., V], nats [...]. A token with p = 0 adds nothing, whatever q is; one with
    q = 0 < p makes it infinite."""
    live = p > -jnp.inf
    # Both factors are replaced where p = 0, since the gradient of a masked inf would be nan.
    p, q = jnp.where(live, p, 0.0), jnp.where(live, q, 0.0)
    return jnp.sum(jnp.where(live, jnp.exp(p) * (p - q), 0.0), axis=-1)


@jax.custom_vjp
def _forward_kl(t: jax.Array, z: jax.Array, most_t: jax.Array, most_z: jax.Array) -> jax.Array:
    """KL(softmax(t) || softmax(z)) of logits [..., V] with these maxima [...]. Its gradient by z has a closed form,
    softmax(z) - softmax(t).

    Each exponential is computed once, for value and gradient; differentiation of `kl` would compute them three times.
    """
    return _forward_kl_and_saved(t, z, most_t, most_z)[0]


def _forward_kl_and_saved(
    t: jax.Array, z: jax.Array, most_t: jax.Array, most_z: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    (of_t, sum_t, log_t), (of_z, sum_z, log_z) = exponentials(t, most_t), exponentials(z, most_z)
    cross = jnp.sum(jnp.where(of_t > 0, of_t * (t - z), 0.0), axis=-1)
    return cross / sum_t - log_t + log_z, (of_t, sum_t, of_z, sum_z)


def _forward_kl_gradient(saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[None, jax.Array, None, None]:
    of_t, sum_t, of_z, sum_z = saved
    return None, of_z * (g / sum_z)[..., None] - of_t * (g / sum_t)[..., None], None, None


_forward_kl.defvjp(_forward_kl_and_saved, _forward_kl_gradient)


def mixture(p: jax.Array, q: jax.Array, share: float) -> jax.Array:
    """Log-probabilities of share * p + (1 - share) * q, from log-probabilities."""
    p, q = p + jnp.log(share), q + jnp.log1p(-share)
    larger, smaller = jnp.maximum(p, q), jnp.minimum(p, q)
    live = larger > -jnp.inf
    # log(a + b) = log a + log(1 + b / a); where both are 0 the difference is nan, so it is computed elsewhere alone.
    ratio = jnp.where(live, smaller, 0.0) - jnp.where(live, larger, 0.0)
    return jnp.where(live, larger + jnp.log1p(jnp.exp(ratio)), -jnp.inf)


def _check_alpha(alpha: float, name: str, limit: str) -> None:
    if not 0 < alpha < 1:
        raise UserError(f"{name}.alpha: {alpha} is not between 0 and 1; typical is 0.1, and {limit}() has none")
