"""How learning rate, weight decay and Adam's memories follow the length of a run, its batch and its size.

A rule takes the numbers that were tuned on a base run to another run. Rules are pure, their numbers may be traced
arrays, and one can follow another: each changes what the last one left. `runs.transferring.transferred` applies them to
an experiment.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

from slmjax.errors import UserError, is_number


class Numbers(NamedTuple):
    """What rules change."""

    peak_lr: Any
    weight_decay: Any = 0.0
    eps: Any = 1e-8
    b1: Any = 0.9
    b2: Any = 0.95
    warmup: Any = 0.0
    """Share of the steps in which the learning rate rises"""


class Ratios(NamedTuple):
    """A run beside the base run: each is its value over that of the base."""

    tokens: Any = 1.0
    """D"""
    batch: Any = 1.0
    """B, tokens a step"""
    params: Any = 1.0
    """N"""

    @property
    def steps(self) -> Any:
        """D / B"""
        return self.tokens / self.batch


class Rule(abc.ABC):
    """A rule of transfer. A subclass is a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, now: Numbers, base: Numbers, ratios: Ratios) -> Numbers:
        """The numbers of the run.

        Args:
            now: what earlier rules gave; of the base, if this is the first.
            base: of the base run.
        """


@dataclass(frozen=True, kw_only=True)
class Steps(Rule):
    """AdamW as a stochastic differential equation: for m times the steps, learning rate and weight decay are divided by
    sqrt(m), epsilon is multiplied by it, and betas are taken to the power of 1/m. Batch and tokens enter through the
    steps alone.

    References:
        Mlodozeniec et al. 2025 (Complete(d)P), arXiv:2512.22382, section 2; Malladi et al. 2022, arXiv:2205.10287
    """

    def __call__(self, now: Numbers, base: Numbers, ratios: Ratios) -> Numbers:
        m = ratios.steps
        return now._replace(
            peak_lr=now.peak_lr * m**-0.5,
            weight_decay=now.weight_decay * m**-0.5,
            eps=now.eps * m**0.5,
            b1=now.b1 ** (1 / m),
            b2=now.b2 ** (1 / m),
        )


@dataclass(frozen=True, kw_only=True)
class Horizon(Rule):
    """The learning rate falls with the tokens of a run: times (D0 / D)^power, and times (B / B0)^batch_power.

    References:
        Bjorck et al. 2024, arXiv:2409.19913 (the optimum falls by a power of the tokens of 0.3 to 0.7); 0.3 and 0.5 are
        those of Marin's Delphi suite (2026), whose losses were predicted 300 times beyond the fit
    """

    power: Any = 0.3
    batch_power: Any = 0.5

    def __post_init__(self) -> None:
        for name in ("power", "batch_power"):
            value = getattr(self, name)
            if is_number(value) and not 0 <= value <= 1:
                raise UserError(f"Horizon.{name} is {value}; expected 0 to 1")

    def __call__(self, now: Numbers, base: Numbers, ratios: Ratios) -> Numbers:
        factor = ratios.batch**self.batch_power * ratios.tokens**-self.power
        return now._replace(peak_lr=now.peak_lr * factor)


@dataclass(frozen=True, kw_only=True)
class Timescale(Rule):
    """The weight decay by which the share of a run that AdamW averages over, tau = B / (lr * weight_decay * D), is that
    of the base times ((D/N) / (D0/N0))^power. Comes after rules that change the learning rate.

    References:
        Bergsma et al. 2025 (Power Lines), arXiv:2505.13738: power -0.527; Wang and Aitchison 2024, arXiv:2405.13698: 0
    """

    power: Any = -0.527

    def __call__(self, now: Numbers, base: Numbers, ratios: Ratios) -> Numbers:
        tau = (ratios.tokens / ratios.params) ** self.power  # over that of the base
        faster = now.peak_lr / base.peak_lr
        return now._replace(weight_decay=base.weight_decay * ratios.batch / (faster * ratios.tokens * tau))


def timescale(*, peak_lr: Any, weight_decay: Any, tokens: Any, batch: Any) -> Any:
    """tau = B / (lr * weight_decay * D): the share of a run over which AdamW averages its updates. Wang and Aitchison
    2024, arXiv:2405.13698; Bergsma et al. 2025, arXiv:2505.13738.

    Args:
        tokens: D, of the run.
        batch: B, tokens a step.
    """
    return batch / (peak_lr * weight_decay * tokens)
