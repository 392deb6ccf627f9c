"""Everything that a table of runs tells, in one value: what `slmjax fit` prints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling import approaches, conventions, identify
from slmjax.scaling.coupled import Coupled
from slmjax.scaling.criterion import HUBER, Criterion
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.fit import Fitted, Method, fit
from slmjax.scaling.law import Additive, chinchilla, tied
from slmjax.scaling.quantity import PARAMETERS, TOKENS, Effective, Quantity, Repeated
from slmjax.scaling.runs import BITS, Runs
from slmjax.scaling.uncertainty import LEVEL, Bootstrap, Profile, bootstrap, lack_of_fit, profile, replicate_spread

Terms = Literal["auto", "none", "precision", "repetition", "both"]
SURE = 0.01
"""The chance of residuals as large as they are, below which the law is said not to fit"""
FAR = 1000.0
"""Approach 2's bias is told for this many times the largest budget, at most 1e24 FLOPs or 10 times it"""


@dataclass(frozen=True)
class Settings:
    """How a table is fitted."""

    criterion: Criterion = HUBER
    method: Method = "projection"
    terms: Terms = "auto"
    same_exponent: bool = False
    coupled: bool = False
    """E + (A / N^alpha + B / D^beta)^gamma (`coupled.Coupled`) instead of a sum"""
    draws: int = 300
    level: float = LEVEL
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise UserError(f"level: {self.level} is not between 0 and 1")
        if self.draws < 2:
            raise UserError(f"draws: {self.draws}; give at least 2, and some hundreds for intervals")


@dataclass(frozen=True)
class Analysis:
    """
    Attributes:
        estimates: parameters of the law by name, and "a" (N* ~ C^a), each with its interval or why it has none.
        profiles: of the exponents, the floor, and what other terms need, by name.
        seeds: the standard deviation of ln(loss) between seeds of one cell.
        others: what approaches 1 and 2 make of the same runs, or why they cannot be used.
        bias: of approach 2 on these cells.
        conventions: a under each convention of FLOPs, if the table has the columns.
        notes: what to know before believing it.
    """

    runs: Runs
    fitted: Fitted
    draws: Bootstrap
    estimates: dict[str, Estimated]
    profiles: dict[str, Profile]
    seeds: Estimated
    others: dict[str, approaches.Frontier | str]
    bias: approaches.Bias | None
    conventions: dict[str, Estimated]
    notes: tuple[str, ...] = field(default=())

    def json(self) -> dict[str, Any]:
        """The figures, for `--json`."""
        others = {
            name: found if isinstance(found, str) else {"a": found.a.json(), "b": found.b.json()}
            for name, found in self.others.items()
        }
        return {
            "runs": len(self.runs),
            "skipped": self.runs.skipped,
            "criterion": {"delta": _number(self.fitted.criterion.delta), "log": self.fitted.criterion.log},
            "objective": self.fitted.objective,
            "level": self.draws.level,
            "parameters": {name: estimate.json() for name, estimate in self.estimates.items()},
            "profiles": {name: found.estimate.json() for name, found in self.profiles.items()},
            "residuals": {
                "rms": float(np.sqrt(np.mean(self.fitted.residuals**2))),
                "largest": float(np.abs(self.fitted.residuals).max()),
            },
            "seeds": self.seeds.json(),
            "approaches": others,
            "approach_2_bias": None if self.bias is None else vars(self.bias),
            "conventions": {name: estimate.json() for name, estimate in self.conventions.items()},
            "notes": list(self.notes),
        }


def law_for(runs: Runs, settings: Settings) -> Additive | Coupled:
    """Chinchilla's law, or the coupled one, with the terms that the settings ask for; `auto`: those whose columns vary.

    Raises:
        UserError: a column that a term needs is not there.
    """
    kinds = tuple(kind for kind in BITS if runs.varies(kind))
    wanted = {"auto": bool(kinds), "none": False, "precision": True, "repetition": False, "both": True}[settings.terms]
    repeats = {"auto": runs.repeats, "none": False, "precision": False, "repetition": True, "both": True}[
        settings.terms
    ]
    if wanted and not kinds:
        raise UserError(f"{runs.source}: a term for precision needs a column bits (of a weight) that varies")
    if repeats and not runs.repeats:
        raise UserError(
            f"{runs.source}: a term for repetition needs a column unique_tokens, below tokens for some runs"
        )
    n: Quantity = Effective(kinds=kinds) if wanted else PARAMETERS
    d: Quantity = Repeated() if repeats else TOKENS
    law = (tied if settings.same_exponent else chinchilla)(n, d)
    return Coupled(law) if settings.coupled else law


def analyse(runs: Runs, settings: Settings | None = None) -> Analysis:
    """Fits a table of runs and says how sure each figure is.

    Raises:
        UserError: the table cannot be fitted at all; the message says what to add.
    """
    settings = Settings() if settings is None else settings
    identify.refuse(runs)
    law = law_for(runs, settings)
    fitted = fit(law, runs.columns, settings.criterion, method=settings.method)
    draws = bootstrap(fitted, settings.draws, level=settings.level, seed=settings.seed, cells=runs.cells)
    estimates = draws.parameters()
    estimates["a"] = from_draws(float(fitted.allocation.a[0]), draws.allocation.a, settings.level)
    design = identify.verdicts(runs, law)
    estimates = identify.judged(estimates, fitted, draws, design)
    # No profile of what the design already leaves open: it would be flat.
    profiled = [p.name for p in law.parameters if p.name not in {*law.linear[1:], *design}]
    profiles = {name: profile(fitted, name, level=settings.level) for name in profiled}
    for name, found in profiles.items():
        if not found.estimate.identified:
            estimates[name] = estimates[name].because(found.estimate.reason)
    exponents = {f.exponent for term in law.terms for f in term.factors}
    if any(not estimates[name].identified for name in exponents):
        which = ", ".join(sorted(name for name in exponents if not estimates[name].identified))
        estimates["a"] = estimates["a"].because(f"it follows from {which}, which the runs do not identify")
    others, bias = _others(runs, fitted, settings)
    told = conventions.flops_per_token(runs.columns)
    plain = law_for(runs, replace(settings, terms="none"))
    by_convention = (
        conventions.exponents(runs, settings.criterion, law=plain, draws=settings.draws) if len(told) > 1 else {}
    )
    return Analysis(
        runs, fitted, draws, estimates, profiles, replicate_spread(runs), others, bias, by_convention,
        tuple(_notes(runs, fitted, law)),
    )  # fmt: skip


def _others(
    runs: Runs, fitted: Fitted, settings: Settings
) -> tuple[dict[str, approaches.Frontier | str], approaches.Bias | None]:
    def attempt(approach: Callable[[], approaches.Frontier]) -> approaches.Frontier | str:
        try:
            return approach()
        except UserError as error:
            return str(error).removeprefix(f"{runs.source}: ")

    others = {
        "1": attempt(lambda: approaches.envelope(runs, level=settings.level)),
        "2": attempt(lambda: approaches.isoflop(runs, level=settings.level, draws=settings.draws, seed=settings.seed)),
    }
    bias = None
    if not isinstance(others["2"], str):
        largest = float(runs["flops"].max())
        far = max(min(FAR * largest, 1e24), 10 * largest)
        try:
            bias = approaches.bias(runs, fitted.predict(runs.columns), fitted.allocation, far)
        except UserError:  # the law's own minima lie beyond the grid, where the runs' noise put them inside
            bias = None
    return others, bias


def _notes(runs: Runs, fitted: Fitted, law: Additive | Coupled) -> list[str]:
    notes = []
    misfit = lack_of_fit(runs, fitted)
    if misfit is not None and misfit.chance < SURE:
        try_it = "" if isinstance(law, Coupled) else "; try the coupled law"
        notes.append(
            f"the law does not fit: its residuals are {misfit.ratio:.1f} times what seeds of one cell explain (chance "
            f"{misfit.chance:.1g}), so its intervals are too narrow{try_it}"
        )
    if runs.skipped:
        notes.append(f"{runs.skipped} rows are left out: diverged, failed, unfinished or held out")
    ratio = runs["flops"] / runs["params"] / runs["tokens"]
    if ratio.max() > 1.05 * ratio.min():
        notes.append(
            f"flops / (params tokens) varies from {ratio.min():.3g} to {ratio.max():.3g}; budgets are split with the "
            f"median, {runs.cost:.3g}. The table of conventions shows what that changes, if it has the columns"
        )
    if runs.repeats and "unique_tokens" not in law.columns:
        notes.append("some runs repeat their data and the law has no term for it")
    if any(runs.varies(kind) and kind not in law.columns for kind in BITS):
        notes.append("the number of bits varies and the law has no term for it")
    if fitted.at_bounds:
        notes.append(f"at the edge of where it was looked for: {', '.join(fitted.at_bounds)}")
    if math.log(runs["flops"].max() / runs["flops"].min()) < math.log(10):
        notes.append("the runs span less than a factor 10 of compute; predictions beyond it are guesses")
    return notes


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else "inf"
