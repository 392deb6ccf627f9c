"""What a design cannot tell, whatever its losses are."""

from __future__ import annotations

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling.coupled import Coupled
from slmjax.scaling.estimated import Estimated
from slmjax.scaling.fit import Fitted
from slmjax.scaling.law import Additive
from slmjax.scaling.runs import Runs
from slmjax.scaling.uncertainty import Bootstrap

MANY_AT_BOUND = 0.05
"""Share of the bootstrap's draws at a bound from which a parameter counts as not identified"""
STRAIGHT = 1e-3
"""Spread of ln D around a line in ln N, relative to that of ln N, below which the two say the same"""
WIDE = 20.0
"""Ratio of the ends of an exponent's interval from which it tells nothing"""


def refuse(runs: Runs) -> None:
    """Raises UserError if no law can be fitted: one run, one size and one amount of data, or one budget."""
    sizes, data = (len(np.unique(runs[name])) for name in ("params", "tokens"))
    if len(runs) < 2 or (sizes == 1 and data == 1):
        raise UserError(f"{runs.source}: all {len(runs)} runs have the same params and tokens; vary them")
    if len(runs.budgets) == 1 and sizes > 1:
        flops = float(np.median(runs["flops"]))
        raise UserError(
            f"{runs.source}: all runs have one budget (C={flops:.3g}), which shows nothing about more compute; add "
            "runs at two other budgets or more"
        )


def verdicts(runs: Runs, law: Additive | Coupled) -> dict[str, str]:
    """Parameters, and "a" (of N* ~ C^a), that the cells of the runs cannot identify, each with the reason."""
    out: dict[str, str] = {}
    for term in law.terms:
        for factor in term.factors:
            about = factor.quantity.columns[0]
            many = len(np.unique(runs[about]))
            names = (term.coefficient, factor.exponent)
            if many == 1:
                out |= dict.fromkeys((*names, law.floor, "a"), f"every run has the same {about}")
            elif many == 2:
                out |= dict.fromkeys((*names, law.floor), f"two values of {about} cannot tell a floor from a power law")
            for p, column in zip(factor.quantity.parameters, factor.quantity.columns[1:], strict=False):
                if column in runs.columns and not runs.varies(column):
                    out[p.name] = f"every run has the same {column}"
            if "unique_tokens" in factor.quantity.columns and not runs.repeats:
                out |= {p.name: "no run sees data twice" for p in factor.quantity.parameters}
    n, d = np.log(runs["params"]), np.log(runs["tokens"])
    if len(np.unique(n)) > 1 and len(law.terms) > 1:
        slope, offset = np.polyfit(n, d, 1)
        if np.std(d - slope * n - offset) < STRAIGHT * np.std(n):
            exponents = [factor.exponent for term in law.terms for factor in term.factors]
            one_ratio = abs(slope - 1) < 0.01
            same = "every run has the same tokens per parameter" if one_ratio else "tokens follow from params"
            names = [term.coefficient for term in law.terms]
            if len(set(exponents)) > 1:
                names = [*exponents, *names, "a"]
            out |= dict.fromkeys(names, f"{same}, so the terms cannot be told apart; vary tokens at each size")
    return out


def judged(
    estimates: dict[str, Estimated], fitted: Fitted, draws: Bootstrap, design: dict[str, str]
) -> dict[str, Estimated]:
    """Estimates with the verdict where the design, or the spread of the refits, says that the runs cannot tell."""
    out = {}
    parameters = {p.name: (i, p) for i, p in enumerate(fitted.law.parameters)}
    for name, estimate in estimates.items():
        if name in design:
            estimate = estimate.because(design[name])
        if name in parameters:
            i, p = parameters[name]
            there = draws.theta[:, i]
            share = float(np.mean((there <= p.low + 1e-6) | (there >= p.high - 1e-6)))
            if share > MANY_AT_BOUND:
                estimate = estimate.because(f"{share:.0%} of the refits end at the edge of what is possible")
            elif (p.starts or p.low > -np.inf) and estimate.high > WIDE * max(estimate.low, 1e-300):
                low, high = f"{estimate.low:.2g}", f"{estimate.high:.2g}"
                estimate = estimate.because(f"refits spread from {low} to {high}")
        out[name] = estimate
    return out
