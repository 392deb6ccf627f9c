"""What a fit is for: the best run within limits, and how well the law predicts runs that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmjax.errors import UserError, positive
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.fit import fit, predictions
from slmjax.scaling.law import Law
from slmjax.scaling.runs import Runs
from slmjax.scaling.uncertainty import LEVEL, Bootstrap, Prediction, bootstrap


@dataclass(frozen=True)
class Limits:
    """What a run may cost.

    Attributes:
        flops: of training.
        size_bytes: of the weights; None: any.
        bits: of a weight, the numbers to choose from. Bytes are params * bits / 8.
        unique_tokens: how many there are; None: enough.
        cost: FLOPs of a parameter and token.
    """

    flops: float
    size_bytes: float | None = None
    bits: tuple[float, ...] = (16.0,)
    unique_tokens: float | None = None
    cost: float = 6.0

    def __post_init__(self) -> None:
        positive(flops=self.flops, size_bytes=self.size_bytes, unique_tokens=self.unique_tokens, cost=self.cost)
        if not self.bits or min(self.bits) <= 0:
            raise UserError(f"bits: {self.bits}; give one or more positive numbers to choose from")

    def check(self, law: Law) -> None:
        """Raises UserError if bits are to be chosen, and the law knows nothing of them."""
        if "bits" not in law.columns and len(set(self.bits)) > 1:
            raise UserError("the law knows nothing of bits; fit one with a term for them (a column bits that varies)")


@dataclass(frozen=True)
class Best:
    """The best run within limits.

    Attributes:
        params, tokens: with the intervals of what refits would have chosen.
        bits: of a weight.
        loss: predicted there.
        choices: the share of the refits that would choose each number of bits.
    """

    params: Estimated
    tokens: Estimated
    bits: float
    loss: Prediction
    choices: dict[float, float]

    def json(self) -> dict[str, object]:
        return {
            "params": self.params.json(),
            "tokens": self.tokens.json(),
            "bits": self.bits,
            "choices": {f"{bits:g}": share for bits, share in self.choices.items()},
            **self.loss.json(),
        }


def best(draws: Bootstrap, limits: Limits) -> Best:
    """Of the lowest predicted loss, by the law of the fit: over sizes on a fine grid, and over numbers of bits if the
    law has a term for them.

    Raises:
        UserError: bits are to be chosen, and the law knows nothing of them.
    """
    law = draws.fitted.law
    limits.check(law)
    most = limits.flops / limits.cost  # params of a run of one token
    where = [_sizes(limits, bits, most) for bits in limits.bits]
    n = np.concatenate(where)
    bits = np.repeat(limits.bits, [len(sizes) for sizes in where])
    tokens = most / n
    unique = tokens if limits.unique_tokens is None else np.minimum(tokens, limits.unique_tokens)
    columns: dict[str, np.ndarray] = {"params": n, "tokens": tokens, "unique_tokens": unique, "bits": bits}
    columns |= {name: np.full(len(n), 16.0) for name in law.columns if name not in columns}
    theta = np.concatenate([draws.fitted.theta[None], draws.theta])
    parts = np.array_split(theta, 1 + len(theta) * len(n) // 1_000_000)
    chosen = np.concatenate([predictions(law, part, columns).argmin(-1) for part in parts])
    first = int(chosen[0])
    counts = {float(b): float(np.mean(bits[chosen[1:]] == b)) for b in limits.bits}
    at = {name: float(values[first]) for name, values in columns.items()}
    return Best(
        from_draws(at["params"], n[chosen[1:]], draws.level),
        from_draws(at["tokens"], tokens[chosen[1:]], draws.level),
        at["bits"],
        draws.predict(**{name: at[name] for name in law.columns}),
        counts,
    )


def _sizes(limits: Limits, bits: float, most: float) -> np.ndarray:
    """Sizes to look at, 1% apart: to the largest that the bytes hold, which is among them."""
    largest = most / 1.01 if limits.size_bytes is None else min(limits.size_bytes * 8 / bits, most / 1.01)
    return largest * np.exp(-0.01 * np.arange(max(1, int(math.log(max(largest, math.e)) / 0.01))))


@dataclass(frozen=True)
class HeldOut:
    """How a fit to some of the runs predicts the others.

    Attributes:
        fitted_runs: how many were fitted.
        predicted, actual: losses of the others, [m], the most expensive last.
        low, high: of the intervals of a new run, [m].
        baseline: what a line of ln(loss) over ln(FLOPs), without a floor, predicts, [m].
        level: of the intervals.
    """

    fitted_runs: int
    predicted: np.ndarray
    actual: np.ndarray
    low: np.ndarray
    high: np.ndarray
    baseline: np.ndarray
    level: float

    @property
    def errors(self) -> np.ndarray:
        """predicted / actual - 1, [m]."""
        return self.predicted / self.actual - 1

    @property
    def baseline_errors(self) -> np.ndarray:
        return self.baseline / self.actual - 1

    @property
    def covered(self) -> float:
        """The share of runs inside their interval."""
        return float(np.mean((self.low <= self.actual) & (self.actual <= self.high)))

    def json(self) -> dict[str, float]:
        return {
            "fitted": self.fitted_runs,
            "predicted": len(self.actual),
            "median_error": float(np.median(np.abs(self.errors))),
            "largest_error": float(np.abs(self.errors).max()),
            "error_of_most_expensive": float(self.errors[-1]),
            "inside_interval": self.covered,
            "median_error_of_a_line_without_floor": float(np.median(np.abs(self.baseline_errors))),
        }


def parted(runs: Runs, above: float) -> tuple[Runs, Runs]:
    """Runs of less than `above` FLOPs, and the others; UserError if there are none of the one or the other."""
    large = runs["flops"] >= above * (1 - 1e-9)
    if not large.any() or large.all():
        raise UserError(
            f"FLOPs of {above:.3g} leave {int((~large).sum())} runs to fit and {int(large.sum())} to predict; "
            f"the table has {runs['flops'].min():.3g} to {runs['flops'].max():.3g}"
        )
    return runs.take(~large), runs.take(large)


def held_out(
    draws: Bootstrap, runs: Runs, above: float, *, count: int = 300, seed: int = 0, level: float = LEVEL
) -> HeldOut:
    """Fits the law of `draws` again to the runs of less compute, and predicts those of `above` FLOPs or more.

    Raises:
        UserError: no run is left on one of the sides, or too few to fit.
    """
    small, rest = parted(runs, above)
    rest = rest.take(np.argsort(rest["flops"], kind="stable"))
    again = fit(draws.fitted.law, small.columns, draws.fitted.criterion)
    refits = bootstrap(again, count, level=level, seed=seed, cells=small.cells)
    every = predictions(again.law, refits.theta, rest.columns)
    noise = np.random.default_rng(seed).choice(refits.noise, every.shape)
    low, high = np.quantile(every * np.exp(noise), [(1 - level) / 2, (1 + level) / 2], axis=0)
    line = np.polyfit(np.log(small["flops"]), np.log(small["loss"]), 1)
    baseline = np.exp(np.polyval(line, np.log(rest["flops"])))
    return HeldOut(len(small), again.predict(rest.columns), rest["loss"], low, high, baseline, level)


def roll_out(draws: Bootstrap, runs: Runs, without: Sequence[int] = (1, 2), *, count: int = 300) -> list[HeldOut]:
    """Held-out evaluations of the top budgets: without the largest one, the two largest, ...

    Raises:
        UserError: there are too few budgets.
    """
    budgets = runs.budgets
    if len(budgets) < max(without) + 2:
        raise UserError(f"{runs.source}: {len(budgets)} budgets; leaving out {max(without)} needs {max(without) + 2}")
    thresholds = [float(runs["flops"][budgets[-k]].min()) for k in without]
    return [held_out(draws, runs, above, count=count, level=draws.level) for above in thresholds]
