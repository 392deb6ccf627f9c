"""Guards against steps whose loss or gradient is not finite, or jumps out of its recent range.

Whether a step is good is computed inside the jitted step, so nothing waits for the host. A bad step changes neither
parameters nor optimizer nor view. Once the host has read that a step was bad, `Guard.then` decides what follows.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.errors import UserError


class Then(enum.Enum):
    """What the loop does after a bad step."""

    GO_ON = enum.auto()
    ROLL_BACK = enum.auto()
    STOP = enum.auto()


class GuardState(NamedTuple):
    """Arrays only, part of the training state."""

    recent: jax.Array
    """[window, 2] float32: loss and gradient norm of the latest good steps, as a ring buffer"""
    good: jax.Array
    """int32 []: good steps so far"""
    skipped: jax.Array
    """int32 []: bad steps so far"""
    consecutive: jax.Array
    """int32 []: bad steps since the last good one"""


@dataclass(frozen=True, kw_only=True)
class Guard(abc.ABC):
    """A step is bad when its loss or gradient norm is not finite, or exceeds the mean of the last `window` good steps
    by more than `sigma` standard deviations (from half a window of good steps on).

    References:
        Chowdhery et al. 2022 (PaLM), arXiv:2204.02311: roll back and skip the data around a spike.
        OLMo et al. 2024, arXiv:2501.00656: skip a step beyond 6 standard deviations over 128 steps.
    """

    sigma: float | None = 6.0
    """Standard deviations; None checks for NaN and Inf only"""
    window: int = 128
    """Good steps that mean and standard deviation are taken over"""

    def __post_init__(self) -> None:
        if self.sigma is not None and self.sigma <= 0:
            raise UserError(f"guard.sigma is {self.sigma}; expected a positive number (6 is usual), or None")
        if self.window < 2:
            raise UserError(f"guard.window is {self.window}; expected at least 2 steps (128 is usual)")

    def init(self) -> GuardState:
        zero = jnp.zeros((), jnp.int32)
        return GuardState(jnp.zeros((self.window, 2), jnp.float32), zero, zero, zero)

    def check(self, state: GuardState, loss: Any, grad_norm: Any) -> tuple[jax.Array, GuardState]:
        """(state, loss [], gradient norm []) -> (good: bool [], state)"""
        now = jnp.stack([loss, grad_norm]).astype(jnp.float32)
        good = jnp.isfinite(now).all()
        if self.sigma is not None:
            good &= ~self._spikes(state, now, self.sigma)
        recent = state.recent.at[state.good % self.window].set(
            jnp.where(good, now, state.recent[state.good % self.window])
        )
        return good, GuardState(
            recent=recent,
            good=state.good + good,
            skipped=state.skipped + ~good,
            consecutive=jnp.where(good, 0, state.consecutive + 1),
        )

    @abc.abstractmethod
    def then(self, consecutive: int, rollbacks: int) -> Then:
        """What follows a bad step, given the bad steps in a row (this one included) and the rollbacks so far."""

    def _spikes(self, state: GuardState, now: jax.Array, sigma: float) -> jax.Array:
        filled = (jnp.arange(self.window) < state.good)[:, None]
        n = jnp.maximum(filled.sum(), 1)
        mean = (state.recent * filled).sum(0) / n
        deviation = jnp.sqrt((jnp.square(state.recent - mean) * filled).sum(0) / n)
        # Each deviation has a floor. The loss of a converged run may vary by less than rounding: 0.1% of its mean.
        # Gradient norms have a heavy tail and often reach twice their mean even where the deviation is small: 50%.
        limit = mean + sigma * jnp.maximum(deviation, jnp.asarray([1e-3, 0.5]) * jnp.abs(mean))
        return (state.good >= (self.window + 1) // 2) & (now > limit).any()


@dataclass(frozen=True, kw_only=True)
class Skip(Guard):
    """Go on with the next batch; after `limit` bad steps in a row, stop with `errors.Diverged`."""

    limit: int = 10

    def then(self, consecutive: int, rollbacks: int) -> Then:
        return Then.STOP if consecutive >= self.limit else Then.GO_ON


@dataclass(frozen=True, kw_only=True)
class Rollback(Guard):
    """Restore the last good checkpoint and go on with the data after the bad batch; after `retries` rollbacks in a
    run, stop with `errors.Diverged`."""

    retries: int = 3

    def then(self, consecutive: int, rollbacks: int) -> Then:
        return Then.STOP if rollbacks >= self.retries else Then.ROLL_BACK


@dataclass(frozen=True, kw_only=True)
class Halt(Guard):
    """Stop at the first bad step with `errors.Diverged`."""

    def then(self, consecutive: int, rollbacks: int) -> Then:
        return Then.STOP
