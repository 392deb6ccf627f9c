"""An experiment cut to fewer steps, for a smoke run: what is given in steps shrinks in the same proportion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmjax.compress.prune.view import Cubic
from slmjax.compress.quant.view import Quantize
from slmjax.config import Experiment
from slmjax.distill.terms import Progressive, Ramp
from slmjax.optim.schedules import Schedule

STEPS: Mapping[type, tuple[str, ...]] = {
    Cubic: ("start", "every"),
    Progressive: ("each",),
    Quantize: ("start",),
    Ramp: ("steps",),
}
"""Fields that are numbers of steps, and those of a `Schedule` whose name ends in `_steps`"""


@dataclass(frozen=True)
class Shortened:
    """An experiment with fewer steps."""

    experiment: Experiment
    changes: tuple[str, ...]
    """What shrank with them: "schedule.warmup_steps 200 -> 3" """


def shortened(experiment: Experiment, steps: int) -> Shortened:
    """The experiment in fewer steps: every number of steps in its schedule, view and objective times
    `steps / experiment.steps`, rounded, and at least 1 where it is 1 or more. With as many steps or more, it is as it
    was.

    Raises:
        UserError: it cannot run in so few steps.
    """
    if not 1 <= steps < experiment.steps:
        return Shortened(experiment, ())
    changes: list[str] = []
    share = steps / experiment.steps
    parts = {
        name: _scaled(getattr(experiment, name), share, name, changes) for name in ("schedule", "view", "objective")
    }
    return Shortened(dataclasses.replace(experiment, steps=steps, **parts), tuple(changes))


def _scaled(value: Any, share: float, where: str, changes: list[str]) -> Any:
    if isinstance(value, tuple):
        parts = tuple(_scaled(part, share, f"{where}.{i}", changes) for i, part in enumerate(value))
        return value if parts == value else parts
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    kinds = next((fields for kind, fields in STEPS.items() if isinstance(value, kind)), ())
    new: dict[str, Any] = {}
    for field in (f for f in dataclasses.fields(value) if f.init):
        old, path = getattr(value, field.name), f"{where}.{field.name}"
        counts = field.name in kinds or (isinstance(value, Schedule) and field.name.endswith("_steps"))
        if counts and isinstance(old, int) and old > 0:
            scaled = max(1, round(old * share))
            if scaled != old:
                new[field.name] = scaled
                changes.append(f"{path} {old} -> {scaled}")
        elif dataclasses.is_dataclass(old) or isinstance(old, tuple):
            inner = _scaled(old, share, path, changes)
            if inner is not old:
                new[field.name] = inner
    return dataclasses.replace(value, **new) if new else value
