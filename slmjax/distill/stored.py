"""What is kept on disk of a teacher's prediction of each token, and how far it is from the whole prediction.

A sparse prediction is a list of events: ids with log-probabilities, where the id -1 stands for every token that is not
listed. `DistillOffline` reads events, whatever kind they came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from slmjax.data.columns import Column, Draws, Halves, Ids, LogProbs, id_dtype
from slmjax.errors import UserError
from slmjax.losses.divergences import kl

BINS = 24
"""Groups of tokens by their probability: above 1/2, above 1/4, ...; the last holds all the rest"""


@dataclass(frozen=True, kw_only=True)
class Stored(ABC):
    """A kind of targets."""

    about: ClassVar[str]
    """What a student learns from it, for messages"""

    @abstractmethod
    def columns(self, tokens: int, width: int) -> Mapping[str, Column]:
        """What is written, by name.

        Args:
            tokens: ids of the tokenizer, from 0.
            width: of the teacher's last hidden state.

        Raises:
            UserError: there are too few tokens.
        """

    @abstractmethod
    def values(self, log_probs: jax.Array, hidden: jax.Array, keys: jax.Array) -> Mapping[str, jax.Array]:
        """The values of each column, [n, width of the column].

        Args:
            log_probs: [n, tokens], of the teacher.
            hidden: [n, D], from which they follow.
            keys: a random key for each token, [n].
        """

    def events(
        self, read: Mapping[str, jax.Array], log_probs: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """What a student learns from, as ids and log-probabilities, each [n, events].

        Args:
            read: the decoded columns, each [n, ...].
            log_probs: hidden states [n, D] -> log-probabilities [n, tokens].
        """
        return read["ids"], read["log_probs"]


@dataclass(frozen=True, kw_only=True)
class TopK(Stored):
    """The k likeliest tokens, with their log-probabilities.

    Biased: the other tokens get the probability 0, and the student learns to be surer than its teacher, whether the k
    probabilities are renormalised or not (Anshumann et al. 2025, arXiv:2503.16870, section 3).
    """

    k: int = 64
    about: ClassVar[str] = "biased: the student learns that the other tokens never follow; tail or sampled are better"

    def columns(self, tokens: int, width: int) -> Mapping[str, Column]:
        _check_k(self.k, tokens)
        return {"ids": Ids(width=self.k, dtype=id_dtype(tokens)), "log_probs": LogProbs(width=self.k)}

    def values(self, log_probs: jax.Array, hidden: jax.Array, keys: jax.Array) -> Mapping[str, jax.Array]:
        likeliest, ids = jax.lax.top_k(log_probs, self.k)
        return {"ids": ids, "log_probs": likeliest}


@dataclass(frozen=True, kw_only=True)
class Tail(Stored):
    """The k likeliest tokens with their log-probabilities, and the log of the probability of all others together.

    The student learns the k probabilities and the sum of the others, and nothing of how the sum is divided.
    """

    k: int = 64
    about: ClassVar[str] = "unbiased for the k tokens and the sum of the others; nothing is learnt of how that divides"

    def columns(self, tokens: int, width: int) -> Mapping[str, Column]:
        _check_k(self.k, tokens)
        ids = Ids(width=self.k, dtype=id_dtype(tokens), rest=True)
        return {"ids": ids, "log_probs": LogProbs(width=self.k + 1)}

    def values(self, log_probs: jax.Array, hidden: jax.Array, keys: jax.Array) -> Mapping[str, jax.Array]:
        likeliest, ids = jax.lax.top_k(log_probs, self.k)
        others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
        rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
        return {"ids": ids, "log_probs": jnp.concatenate([likeliest, rest], axis=-1)}


@dataclass(frozen=True, kw_only=True)
class Sampled(Stored):
    """Tokens drawn from the teacher's distribution; a token's probability is its share of the draws. Anshumann et al.
    2025 (random sampling knowledge distillation), arXiv:2503.16870.

    Unbiased: the expected gradient of the forward KL is that of the whole distribution. The draws are stratified, one
    in each of `draws` equal parts of the cumulated distribution: every token is drawn as often as by independent draws
    on average, with less variance.
    """

    draws: int = 64
    about: ClassVar[str] = "unbiased: the expected gradient of the forward KL is that of the whole distribution"

    def columns(self, tokens: int, width: int) -> Mapping[str, Column]:
        if self.draws < 1:
            raise UserError(f"--draws is {self.draws}; expected at least 1")
        return {"draws": Draws(width=self.draws, dtype=id_dtype(tokens))}

    def values(self, log_probs: jax.Array, hidden: jax.Array, keys: jax.Array) -> Mapping[str, jax.Array]:
        def draw(log_probs: jax.Array, key: jax.Array) -> jax.Array:
            upto = jnp.cumsum(jnp.exp(log_probs))
            at = (jnp.arange(self.draws) + jax.random.uniform(key, (self.draws,), log_probs.dtype)) / self.draws
            # The first token whose cumulated probability is above the draw: never one of probability 0.
            ids = jnp.searchsorted(upto, jnp.minimum(at, 1 - jnp.finfo(at.dtype).epsneg) * upto[-1], side="right")
            return jnp.minimum(ids, log_probs.shape[-1] - 1)

        return {"draws": jax.vmap(draw)(log_probs, keys)}


@dataclass(frozen=True, kw_only=True)
class LastHidden(Stored):
    """The teacher's last hidden state in half precision, from which its output table gives every logit."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    about: ClassVar[str] = "the whole distribution, but for the rounding of the hidden state to half precision"

    def columns(self, tokens: int, width: int) -> Mapping[str, Column]:
        return {"hidden": Halves(width=width, dtype=self.dtype)}

    def values(self, log_probs: jax.Array, hidden: jax.Array, keys: jax.Array) -> Mapping[str, jax.Array]:
        return {"hidden": hidden}

    def events(
        self, read: Mapping[str, jax.Array], log_probs: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        found = log_probs(read["hidden"])
        return jnp.broadcast_to(jnp.arange(found.shape[-1]), found.shape), found


def _check_k(k: int, tokens: int) -> None:
    if not 1 <= k <= tokens:
        raise UserError(f"--k is {k}; expected 1 to {tokens}, the number of tokens of the data's tokenizer")


def listed(ids: jax.Array, log_probs: jax.Array) -> jax.Array:
    """The log-probability of each event under a whole distribution.

    The sum of the listed probabilities is clamped below 1 where the others are what is left, so that their logarithm
    and its gradient stay finite.

    Args:
        ids: int [..., events]; -1 stands for every token that is not listed.
        log_probs: [..., V].

    Returns:
        [..., events]
    """
    rest = ids < 0
    found = jnp.take_along_axis(log_probs, jnp.where(rest, 0, ids), axis=-1)
    together = jnp.sum(jnp.where(rest, 0.0, jnp.exp(found)), axis=-1, keepdims=True)
    left = jnp.log(jnp.maximum(1.0 - together, jnp.finfo(log_probs.dtype).eps))
    return jnp.where(rest, left, found)


def normalised(log_probs: jax.Array) -> jax.Array:
    """Log-probabilities [..., events] of events whose probabilities sum to 1."""
    return log_probs - jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)


def errors(ids: jax.Array, log_probs: jax.Array, full: jax.Array) -> dict[str, jax.Array]:
    """How far stored predictions are from whole ones, as sums over n tokens.

    Args:
        ids, log_probs: events, each [n, events].
        full: the teacher's log-probabilities [n, V].

    Returns:
        `kl`: of KL(stored || whole), over the events, the stored ones renormalised. `moved` [BINS + 1]: the stored
        minus the teacher's probability of the tokens in each group of tokens of similar probability; the last group
        is the rest, where it has a probability of its own.
    """
    stored = normalised(log_probs)
    rows = jnp.arange(len(ids))[:, None]
    real, mass = ids >= 0, jnp.exp(stored)
    q = jnp.zeros_like(full).at[rows, jnp.where(real, ids, 0)].add(jnp.where(real, mass, 0.0))
    named = jnp.zeros(full.shape, bool).at[rows, jnp.where(real, ids, 0)].max(real)
    rest = jnp.any(~real, axis=-1, keepdims=True)
    group = jnp.clip(jnp.floor(-full / jnp.log(2.0)), 0, BINS - 1).astype(jnp.int32)
    group = jnp.where(rest & ~named, BINS, group)
    moved = jnp.zeros((len(ids), BINS + 1), full.dtype).at[rows, group].add(q - jnp.exp(full))
    moved = moved.at[:, BINS].add(jnp.sum(jnp.where(real, 0.0, mass), axis=-1))
    return {"kl": jnp.sum(kl(stored, listed(ids, full))), "moved": jnp.sum(moved, axis=0)}


def calibration_error(moved: Any, tokens: int) -> float:
    """Half the sum of |moved| over the groups, a token: the probability that is in the wrong group on average. Errors
    that cancel out over tokens, such as those of unbiased draws, do not count."""
    return float(abs(moved).sum() / 2 / max(tokens, 1))
