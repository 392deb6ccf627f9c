"""The fit while a sweep runs: how well it predicts its target by now, which cell would help most, when it is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling.analysis import Settings
from slmjax.scaling.fit import predictions
from slmjax.scaling.runs import read as read_runs
from slmjax.scaling.uncertainty import Bootstrap, Prediction
from slmjax.sweeps.folder import ENDED, Folder, Planned, State
from slmjax.sweeps.predicting import at, refits


@dataclass(frozen=True)
class Current:
    """What the cells that are complete say about the target."""

    target: Mapping[str, float]
    """Quantities of the run that is predicted: params, tokens, ..."""
    draws: Bootstrap
    runs: int

    @property
    def prediction(self) -> Prediction:
        return self.draws.predict(**{name: self.target[name] for name in self.draws.fitted.law.columns})

    @property
    def half_width(self) -> float:
        """Of the interval of the law at the target, as a share of the predicted loss. More runs narrow it; the interval
        of one run has the noise of a run besides."""
        mean = self.prediction.mean
        return (mean.high - mean.low) / 2 / mean.value

    def __str__(self) -> str:
        found = self.prediction
        return (
            f"fit of {self.runs} runs: loss {found.mean.value:.4f} ± {self.half_width:.2%} "
            f"({self.draws.level:.0%} interval of the law {found.mean.low:.4f} to {found.mean.high:.4f}, of one run "
            f"{found.run.low:.4f} to {found.run.high:.4f}) at params {self.target['params']:.4g}, "
            f"tokens {self.target['tokens']:.4g}"
        )


def current(folder: Folder, target: Mapping[str, float] | None = None, settings: Settings | None = None) -> Current:
    """
    Args:
        target: quantities by name, at least params and tokens; None: the held-out cell.

    Raises:
        UserError: there is no held-out cell, or the runs cannot be fitted yet.
    """
    held_out = folder.held_out
    if target is None and held_out is None:
        raise UserError("the sweep has no held-out cell; name what to predict, such as --target params=1e6,tokens=2e7")
    runs = read_runs(folder.write_results())
    draws = refits(runs, Settings(coupled=folder.coupled) if settings is None else settings)
    law = draws.fitted.law
    if target is None:
        assert held_out is not None
        return Current({**at(law, held_out), "params": held_out.params, "tokens": held_out.tokens}, draws, len(runs))
    if missing := {"params", "tokens"} - target.keys():
        raise UserError(f"--target has no {', '.join(sorted(missing))}; expected such as params=1e6,tokens=2e7")
    rest = {name: target["tokens"] if name == "unique_tokens" else 16.0 for name in law.columns}
    return Current({**rest, **target}, draws, len(runs))


@dataclass(frozen=True)
class Proposal:
    """A cell, and what its run is expected to make of the half-width of the interval."""

    cell: Planned
    half_width: float


def proposals(found: Current, cells: Sequence[Planned]) -> list[Proposal]:
    """The cells, the one first that is expected to narrow the interval most.

    With the refits of the bootstrap as an ensemble, a run at a cell of which the refits' ln(loss) has the covariance c
    with that at the target takes c^2 / (v + s^2) from the target's variance; v is the variance at the cell, s that of
    the runs around the fit (the update of a linear Gaussian model, as in an ensemble Kalman filter, Evensen 1994).
    """
    law, draws = found.draws.fitted.law, found.draws
    theta = draws.theta[np.isfinite(predictions(law, draws.theta, found.target)).all(axis=1)]
    target = np.log(predictions(law, theta, found.target)[:, 0])
    noise = float(np.mean(draws.noise**2))
    out = []
    for cell in cells:
        there = np.log(predictions(law, theta, at(law, cell))[:, 0])
        (own, both), (_, whole) = np.cov(there, target)
        left = 1 - both**2 / max((own + noise) * whole, 1e-300)
        out.append(Proposal(cell, found.half_width * math.sqrt(max(left, 0.0))))
    return sorted(out, key=lambda proposal: proposal.half_width)


def waiting(folder: Folder, states: Mapping[str, State]) -> list[Planned]:
    """Cells that have not begun, nor been dropped, and are fitted."""
    return [cell for cell in folder.cells if states[cell.hash].name == "waiting" and not cell.held_out]


def imagined(folder: Folder) -> list[Planned]:
    """Runs of the sizes and budgets of the sweep, and of twice its largest budget, as cells without a hash."""
    fitted = [cell for cell in folder.cells if not cell.held_out]
    sizes = {cell.params: cell for cell in fitted}
    budgets = {float(f"{cell.flops:.2g}") for cell in fitted}
    out = []
    for params, cell in sizes.items():
        for flops in {*budgets, 2 * max(budgets)}:
            tokens = round(flops * cell.tokens / cell.flops)
            longer, label = tokens / cell.tokens, f"params={params:,}, tokens={tokens:,}"
            out.append(
                replace(
                    cell, hash="", label=label, tokens=tokens, flops=flops, seconds=cell.seconds * longer,
                    steps=max(1, round(cell.steps * longer)), unique_tokens=float(tokens), trunk="", shared=0,
                )
            )  # fmt: skip
    return out


def skip_the_rest(folder: Folder, states: Mapping[str, State], found: Current) -> int:
    """Leaves out the cells that have not begun: the interval is narrow enough. Returns how many."""
    cells = [cell for cell in waiting(folder, states) if states[cell.hash].step == 0]
    for cell in cells:
        reason = f"not needed: after {found.runs} runs the interval is {found.half_width:.2%}"
        folder.append("skipped", cell, reason=reason)
    return len(cells)


def take_back(folder: Folder, states: Mapping[str, State]) -> None:
    """Cells that an earlier command has left out are to run."""
    last = {event["cell"]: event["event"] for event in folder.events() if event["event"] in ("skipped", "wanted")}
    for cell in folder.cells:
        if last.get(cell.hash) == "skipped" and states[cell.hash].name not in set(ENDED) - {"dropped"}:
            folder.append("wanted", cell)
