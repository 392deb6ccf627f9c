"""Models of several sizes for several budgets of compute: the design of approach 2 of Hoffmann et al. (2022)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from slmjax.config import Experiment
from slmjax.errors import UserError, positive
from slmjax.models.assembly import Assembly
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.sweeps.cells import Cell, Cells, cells, flops_a_token, tagged

FEWEST_STEPS = 10
"""Of a run that tells anything"""


Size = TypeVar("Size", bound=float)
_count = functools.cache(parameter_count)


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Llamas of one shape: a number of parameters -> the model of that shape which is nearest to it.

    The width is a multiple of `multiple`, the depth the width over `aspect` or `layers` in every size, the hidden layer
    8/3 of the width, rounded to a multiple of 8; every head has `head_dim` channels.
    """

    vocab: int
    context: int
    aspect: float = 32.0
    """Width over layers"""
    layers: int | None = None
    """As many in every size. Where `aspect` gives few, each further one is a step in the loss, which no law has"""
    head_dim: int = 16
    multiple: int = 8
    tied: bool = True

    def wide(self, width: int) -> Assembly:
        """The model of this width."""
        heads = max(1, round(width / self.head_dim))
        return llama(
            layers=self.layers or max(1, round(width / self.aspect)), width=width, heads=heads, kv_heads=heads,
            head_dim=self.head_dim, hidden=max(8, 8 * round(width / 3)), vocab=self.vocab, context=self.context,
            tied=self.tied,
        )  # fmt: skip

    def __call__(self, params: float) -> Assembly:
        """The model with the number of parameters that is nearest to `params`, by their ratio."""
        positive(params=params)
        low, high = 1, 2
        while _count(self.wide(high * self.multiple)) < params:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _count(self.wide(middle * self.multiple)) < params else (low, middle)
        around = [self.wide(n * self.multiple) for n in (low, high)]
        return min(around, key=lambda model: abs(math.log(_count(model) / params)))


def isoflop(
    base: Cells,
    budgets: Sequence[float],
    sizes: Sequence[Size] | Mapping[float, Sequence[Size]],
    model: Callable[[Size], Assembly],
    adapt: Callable[[Experiment], Experiment] | None = None,
) -> tuple[Cell, ...]:
    """Every size at every budget C, for as many steps as C allows: tokens D = C / FLOPs a token, by convention (iii)
    of `models.flops` (head and attention counted), rounded to whole steps.

    Args:
        budgets: FLOPs of a run.
        sizes: what `model` makes models from, such as numbers of parameters; or those of each budget.
        model: size -> model, such as a `LlamaShape`.
        adapt: sets what follows from size and steps, such as the warm-up and the learning rate.

    Raises:
        UserError: a budget without sizes, two sizes that give one model, or fewer than `FEWEST_STEPS` steps.
    """
    out = []
    for cell in cells(base):
        for budget in budgets:
            several = sizes.get(budget, ()) if isinstance(sizes, Mapping) else sizes
            if not several:
                raise UserError(f"isoflop: the budget {budget:g} has no sizes")
            before: dict[int, float] = {}
            for size in several:
                made = at_budget(replace(cell.experiment, model=model(size)), budget)
                params = _count(made.model)
                if params in before:
                    raise UserError(
                        f"isoflop: sizes {before[params]:g} and {size:g} give the same model of {params:,} parameters; "
                        "take them farther apart, or let the rule make finer steps"
                    )
                before[params] = size
                out.append(tagged(cell, made if adapt is None else adapt(made), budget=budget, params=params))
    return tuple(out)


def at_budget(experiment: Experiment, flops: float) -> Experiment:
    """The experiment with as many steps as `flops` FLOPs allow.

    Raises:
        UserError: they are fewer than `FEWEST_STEPS`.
    """
    a_step = flops_a_token(experiment) * experiment.data.batch * experiment.data.length
    steps = round(flops / a_step)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"isoflop: {flops:g} FLOPs are {flops / a_step:.1f} steps of a model of "
            f"{parameter_count(experiment.model):,} parameters; expected at least {FEWEST_STEPS}: raise the budget, or "
            "lower data.batch or the size"
        )
    return replace(experiment, steps=steps)
