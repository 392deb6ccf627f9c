"""The numbers of an optimizer, tuned in one experiment, taken to another of other length, batch and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slmjax.config import Experiment
from slmjax.errors import UserError
from slmjax.models.flops import parameter_count
from slmjax.optim.recipes import AdamW
from slmjax.optim.transfer import Numbers, Ratios, Rule, Steps

OF_OPTIMIZER = ("weight_decay", "eps", "b1", "b2")
"""Those of `Numbers` that are fields of AdamW"""


def transferred(experiment: Experiment, base: Experiment, rules: Sequence[Rule] = (Steps(),)) -> Experiment:
    """The experiment with the schedule and the optimizer of the base, whose numbers the rules change in turn. The
    warm-up takes the same share of the steps.

    How width and depth enter is said by the model (`models.parametrisation`).

    Raises:
        UserError: the base's optimizer lacks a number that a rule changes.
    """
    optimizer: Any = base.optimizer
    there = {name: getattr(optimizer, name) for name in OF_OPTIMIZER if hasattr(optimizer, name)}
    numbers = Numbers(peak_lr=base.schedule.peak_lr, warmup=base.schedule.warmup_steps / base.steps, **there)
    now = numbers
    for rule in rules:
        now = rule(now, numbers, ratios(experiment, base))
    changed = {name: getattr(now, name) for name in OF_OPTIMIZER if getattr(now, name) is not getattr(numbers, name)}
    missing = [name for name in changed if name not in there]
    if missing or ({"eps", "b1", "b2"} & set(changed) and type(optimizer) is not AdamW):
        names, kinds = ", ".join(missing or changed), ", ".join(type(rule).__name__ for rule in rules)
        raise UserError(
            f"optimizer {type(optimizer).__name__}: the rules {kinds} change {names} as AdamW has them; use AdamW, or "
            "rules for the learning rate and the weight decay alone, such as Horizon"
        )
    schedule = replace(base.schedule, peak_lr=now.peak_lr, warmup_steps=round(now.warmup * experiment.steps))
    return replace(experiment, schedule=schedule, optimizer=replace(optimizer, **changed))


def ratios(experiment: Experiment, base: Experiment) -> Ratios:
    """How much larger the experiment is: tokens, tokens a step, parameters."""
    batch, of_base = (e.data.batch * e.data.length for e in (experiment, base))
    return Ratios(
        tokens=experiment.steps * batch / (base.steps * of_base),
        batch=batch / of_base,
        params=parameter_count(experiment.model) / parameter_count(base.model),
    )
