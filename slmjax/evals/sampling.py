"""Choosing the next token from logits. Each rule is a value; a `Sampler` holds a tuple of rules.

Every rule maps (logits [B, V] float32, seen [B, V] bool) to logits [B, V], -inf for forbidden tokens, and agrees with
the logits processor of the same name in `transformers`. `seen` marks the tokens that occur in the prompt or were
generated so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from slmjax.errors import UserError

Rule: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of seen tokens by `penalty`, multiplies negative ones. Keskar et al. 2019, 1909.05858.

    Padding is never in `seen` (`transformers` penalises the pad token of a left-padded batch; here a prompt's
    continuation does not depend on the other prompts of the batch).
    """

    penalty: float

    def __post_init__(self) -> None:
        require(self.penalty > 0, "repetition_penalty", self.penalty, "greater than 0 (1 leaves the logits alone)")

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        penalised = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(seen, penalised, logits)


@dataclass(frozen=True)
class Temperature:
    """Divides the logits: below 1 sharpens, above 1 flattens."""

    temperature: float

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "greater than 0 (greedy needs no temperature)")

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return logits / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits, and those equal to the k-th. Fan et al. 2018, arXiv:1805.04833."""

    k: int

    def __post_init__(self) -> None:
        require(self.k >= 1, "top_k", self.k, "at least 1")

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        largest, _ = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))
        return keep(logits >= largest[:, -1:], logits)


@dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of most likely tokens that together reach p. Holtzman et al. 2020, arXiv:1904.09751.

    Tokens as likely as the least likely one of the set are kept too.
    """

    p: float

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "top_p", self.p, "in (0, 1]")

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        ascending = jnp.sort(logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)  # of a token and all less likely ones
        outside = (mass <= 1 - self.p).at[:, -1].set(False)
        threshold = jnp.min(jnp.where(outside, jnp.inf, ascending), axis=-1, keepdims=True)
        return keep(logits >= threshold, logits)


@dataclass(frozen=True)
class MinP:
    """Keeps tokens at least p times as likely as the most likely one. Nguyen et al. 2024, arXiv:2407.01082."""

    p: float

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, "min_p", self.p, "in [0, 1]")

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(logits, axis=-1)
        return keep(probabilities >= self.p * jnp.max(probabilities, axis=-1, keepdims=True), logits)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Applies `rules` in order, then takes the largest logit (`greedy`) or draws from their softmax."""

    rules: tuple[Rule, ...] = ()
    greedy: bool = True

    def logits(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        """(logits [B, V], seen [B, V]) -> the logits that the choice is made from, float32 [B, V]."""
        logits = logits.astype(jnp.float32)
        for rule in self.rules:
            logits = rule(logits, seen)
        return logits

    def __call__(self, keys: Any, logits: jax.Array, seen: jax.Array) -> jax.Array:
        """(PRNG keys [B], logits [B, V], seen [B, V]) -> tokens int32 [B]. Each row draws from its own key."""
        logits = self.logits(logits, seen)
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sampler(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> Sampler:
    """The rules in the order of `transformers`' `generate`. Temperature 0 is greedy and ignores top_k, top_p, min_p.

    Raises:
        UserError: a value is outside its range; the message names it.
    """
    require(temperature >= 0, "temperature", temperature, "at least 0 (0 is greedy)")
    penalty = (RepetitionPenalty(repetition_penalty),) if repetition_penalty != 1 else ()
    restrictions = (
        *(() if top_k is None else (TopK(top_k),)),
        *(() if top_p is None else (TopP(top_p),)),
        *(() if min_p is None else (MinP(min_p),)),
    )
    if temperature == 0:
        return Sampler(rules=penalty, greedy=True)
    warmth = (Temperature(temperature),) if temperature != 1 else ()
    return Sampler(rules=(*penalty, *warmth, *restrictions), greedy=False)


GREEDY = Sampler()


def keep(condition: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.where(condition, logits, -jnp.inf)


def require(condition: bool, name: str, value: float | int, expected: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value}; expected {expected}")
