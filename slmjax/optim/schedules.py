"""Learning rate as a function of the step.

Every schedule rises linearly from `peak_lr / warmup_steps` at step 0 to `peak_lr` at step `warmup_steps - 1`: no update
has a learning rate of zero. A decay starts from `peak_lr` at step `warmup_steps` and would reach its final value at
step `steps`, one after the last.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import optax

from slmjax.errors import UserError, is_number
from slmjax.traced import TRACED

Curve = Callable[[Any], Any]
"""step, int32 [] -> learning rate, float32 []"""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Linear warm-up, then the curve of `after_warmup`.

    `peak_lr` and the fractions may be arrays, traced ones too; plain Python numbers are checked.
    """

    peak_lr: float = field(metadata=TRACED)
    """The highest learning rate"""
    warmup_steps: int = 0

    def __post_init__(self):
        if is_number(self.peak_lr) and not (math.isfinite(self.peak_lr) and self.peak_lr > 0):
            raise UserError(f"schedule.peak_lr is {self.peak_lr}; it must be a positive number, such as 3e-3")
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more")

    @abstractmethod
    def after_warmup(self, steps: int) -> Curve:
        """The curve over the `steps` steps that follow the warm-up, counted from 0."""

    def build(self, steps: int) -> Curve:
        """The learning rate over `steps` steps, usable inside jit.

        Raises:
            UserError: the warm-up is longer than the run.
        """
        if self.warmup_steps > steps:
            raise UserError(
                f"schedule.warmup_steps is {self.warmup_steps}, longer than the run of {steps} steps; lower it"
            )
        after = self.after_warmup(steps - self.warmup_steps)
        if self.warmup_steps == 0:
            return after
        first = self.peak_lr / self.warmup_steps
        # It would end one step past the boundary: `linear_schedule` needs at least one transition step.
        rise = optax.linear_schedule(first, self.peak_lr + first, self.warmup_steps)
        return optax.join_schedules([rise, after], [self.warmup_steps])


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """`peak_lr` to the end."""

    def after_warmup(self, steps: int) -> Curve:
        return optax.constant_schedule(self.peak_lr)


@dataclass(frozen=True, kw_only=True)
class Decaying(Schedule):
    """Ends at `final_fraction` times `peak_lr`."""

    final_fraction: float = field(default=0.0, metadata=TRACED)

    def __post_init__(self):
        super().__post_init__()
        _check_fraction("final_fraction", self.final_fraction)


@dataclass(frozen=True, kw_only=True)
class Linear(Decaying):
    """Falls along a straight line, by default to zero.

    A decay to zero gives a lower loss than a cosine to a tenth at equal tokens.

    References:
        Bergsma et al. 2025, Straight to Zero, arXiv:2502.15938
    """

    def after_warmup(self, steps: int) -> Curve:
        return optax.linear_schedule(self.peak_lr, self.peak_lr * self.final_fraction, max(steps, 1))


@dataclass(frozen=True, kw_only=True)
class Cosine(Decaying):
    """Falls along half a cosine, by default to a tenth.

    References:
        Loshchilov and Hutter 2017, SGDR, arXiv:1608.03983
    """

    final_fraction: float = 0.1

    def after_warmup(self, steps: int) -> Curve:
        return optax.cosine_decay_schedule(self.peak_lr, max(steps, 1), self.final_fraction)


@dataclass(frozen=True, kw_only=True)
class WSD(Decaying):
    """Warm-up, stable, decay: holds `peak_lr`, then falls over the last `decay_fraction` of all steps.

    With p the completed fraction of the decay, the learning rate is `peak_lr * (1 - (1 - final_fraction) * p**power)`:
    `power` 1 is a straight line, 0.5 the "1 - sqrt" shape.

    References:
        Hu et al. 2024, MiniCPM, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392 (1 - sqrt)
    """

    decay_fraction: float = 0.2
    """Fraction of all steps, including the warm-up, in which the learning rate falls"""
    power: float = field(default=1.0, metadata=TRACED)

    def __post_init__(self):
        super().__post_init__()
        _check_fraction("decay_fraction", self.decay_fraction)
        if is_number(self.power) and not self.power > 0:
            raise UserError(f"schedule.power is {self.power}; it must be positive: 1 is linear, 0.5 is 1 - sqrt")

    def after_warmup(self, steps: int) -> Curve:
        total = steps + self.warmup_steps
        decay = round(self.decay_fraction * total)
        if decay > steps:
            raise UserError(
                f"schedule.warmup_steps ({self.warmup_steps}) and decay_fraction ({self.decay_fraction}) take more "
                f"than the run's {total} steps; lower one of them"
            )

        def fall(step):
            progress = jnp.clip(step / max(decay, 1), 0.0, 1.0)
            return self.peak_lr * (1.0 - (1.0 - self.final_fraction) * progress**self.power)

        return optax.join_schedules([optax.constant_schedule(self.peak_lr), fall], [steps - decay])


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """`peak_lr * sqrt(warmup_steps / (step + 1))`: needs no number of steps, so a run can be extended.

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 5.3
    """

    def after_warmup(self, steps: int) -> Curve:
        warmup = max(self.warmup_steps, 1)
        return lambda step: self.peak_lr * jnp.sqrt(warmup / (step + self.warmup_steps + 1.0))


def _check_fraction(field: str, value: float) -> None:
    if is_number(value) and not 0.0 <= value <= 1.0:
        raise UserError(f"schedule.{field} is {value}; it must lie between 0 and 1")
