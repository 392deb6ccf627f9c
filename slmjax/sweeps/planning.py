"""What a sweep will cost, and what it will be unable to tell, before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slmjax.config import Experiment, Runtime
from slmjax.errors import UserError
from slmjax.models.flops import nonembedding_count, parameter_count
from slmjax.runs import teaching
from slmjax.runs.estimate_memory import estimate, one_change
from slmjax.runs.estimate_time import calibrate
from slmjax.runs.launch import open_data
from slmjax.runs.populations import shape_of
from slmjax.runs.same_compute import choice_of
from slmjax.scaling import identify
from slmjax.scaling.analysis import Settings, law_for
from slmjax.scaling.approaches import FEWEST
from slmjax.scaling.runs import Runs
from slmjax.serialise import TRUSTED, fingerprint, to_json
from slmjax.sweeps import trunks
from slmjax.sweeps.cells import Cell, Sweep, flops_a_token, tokens
from slmjax.sweeps.folder import Folder, Planned
from slmjax.track.progress import si

MEASURE = 0.2
"""Seconds of matrix products of each model, from which its time is estimated"""


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        experiments: of each cell by its hash, as JSON.
        too_large: why cells cannot run, a line for each.
        warnings: what else to know before running it.
    """

    folder: Folder
    experiments: dict[str, Any]
    too_large: tuple[str, ...]
    warnings: tuple[str, ...]


def plan(sweep: Sweep, source: Path | None, out: Path, *, data_dir: str, memory: float, progress: Any = None) -> Plan:
    """Sizes, time and memory of every cell. Opens the data, and builds what is not prepared yet.

    Args:
        source: the file of the sweep.
        memory: bytes that a device has.

    Raises:
        UserError: a cell has no validation, or its data does not fit the model.
        DataError: data is missing or damaged.
    """
    runtime = Runtime(workdir=str(out), data_dir=data_dir)
    costs = _Costs(runtime, memory, progress)
    planned, experiments, too_large = [], {}, []
    for cell in sweep.everything:
        named = replace(cell.experiment, name=f"{sweep.name}-{cell.hash[:8]}")
        described = to_json(named)
        own = any(not _trusted(name) for name in _types(described))
        made, change = costs.of(cell, held_out=cell is sweep.held_out, code=own)
        planned.append(made)
        experiments[made.hash] = described
        if change is not None:
            too_large.append(f"{made.hash} ({made.label}) takes {si(made.memory)}B of {si(memory)}B; {change}")
    planned = trunks.shared(planned, {cell.hash: cell.experiment for cell in sweep.everything})
    source_file = str(source.resolve()) if source else ""
    folder = Folder(
        out, sweep.name, tuple(planned), source_file, data_dir, jax.default_backend(), memory, sweep.coupled
    )
    return Plan(folder, experiments, tuple(too_large), (*_repeats(planned), *design(planned)))


def design(cells: list[Planned] | tuple[Planned, ...]) -> list[str]:
    """What a fit to these cells could not tell, whatever their losses are. Nothing if all have one size and amount of
    data: those are no design for a scaling law."""
    fitted = [cell for cell in cells if not cell.held_out]
    columns = {name: np.asarray([getattr(c, name) for c in fitted], float) for name in ("params", "tokens", "flops")}
    if all(len(np.unique(columns[name])) == 1 for name in ("params", "tokens")):
        return []
    columns["loss"] = np.ones(len(fitted))
    columns["unique_tokens"] = np.asarray([cell.unique_tokens for cell in fitted], float)
    runs = Runs(columns, source="a scaling law")
    try:
        identify.refuse(runs)
    except UserError as error:
        return [str(error)]
    verdicts = identify.verdicts(runs, law_for(runs, Settings()))
    why: dict[str, list[str]] = {}
    for name, reason in verdicts.items():
        why.setdefault(reason, []).append(name)
    out = [f"a scaling law: {', '.join(names)} cannot be identified: {reason}" for reason, names in why.items()]
    few = [b for b in runs.budgets if len(np.unique(runs["params"][b])) < FEWEST]
    if runs.budgets and len(few) < len(runs.budgets):
        out += [
            f"a scaling law: budget {runs['flops'][b].mean():.3g} has fewer than {FEWEST} sizes, too few for a parabola"
            for b in few
        ]
    if len(fitted) < 6:
        out.append(f"a scaling law has 5 parameters; {len(fitted)} runs leave nothing to judge the fit by")
    return out


def _repeats(cells: list[Planned]) -> list[str]:
    several = [cell for cell in cells if cell.tokens > cell.unique_tokens]
    if not several:
        return []
    worst = max(several, key=lambda cell: cell.tokens / cell.unique_tokens)
    times = worst.tokens / worst.unique_tokens
    return [
        f"{len(several)} of {len(cells)} cells repeat their data, {worst.label} {times:.1f} times: the store has "
        f"{si(worst.unique_tokens).strip()} tokens. A fit then needs the term for repetition (results.tsv has the "
        "column unique_tokens); more text avoids it"
    ]


class _Costs:
    """Measures each model and each kind of step once, however many cells share it."""

    def __init__(self, runtime: Runtime, memory: float, progress: Any):
        choice = choice_of(runtime, Path(runtime.workdir))
        self.compute, self.mesh = choice.compute, dict(runtime.mesh.build().shape)
        self.runtime, self.limit, self.progress = runtime, memory, progress
        self.known: dict[str, Any] = {}

    def once(self, about: str, value: Any, find: Any) -> Any:
        key = f"{about} {fingerprint(to_json(value))}"
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    def of(self, cell: Cell, *, held_out: bool, code: bool) -> tuple[Planned, str | None]:
        """The cell with its costs, and what to change if it does not fit."""
        experiment = cell.experiment
        if not experiment.evaluation.every:
            raise UserError(f"{cell.label}: evaluation.every is 0; a sweep compares validation losses, so evaluate")
        data = replace(experiment.data, batch=1)
        if hasattr(data, "seed"):
            data = replace(data, seed=0)  # type: ignore[call-arg]
        asked = replace(experiment, data=data, accumulate=1)
        opened = self.once(
            "data", (data, experiment.model.vocab), lambda: open_data(asked, self.runtime, self.progress)
        )
        if not opened.has_validation:
            raise UserError(f"{cell.label}: {opened.name} has no validation split; a sweep compares validation losses")
        trained = teaching.for_estimates(experiment, self.compute)
        e = experiment
        of_step = (e.model, e.data, e.objective, e.optimizer, e.view, e.numerics, e.guard, e.accumulate)
        memory = self.once("step", of_step, lambda: estimate(trained, self.compute, self.mesh))
        flops, total = flops_a_token(trained), tokens(experiment)
        batch = experiment.data.batch * experiment.data.length
        rows = min(batch, 2048)
        speed = self.once(
            f"speed {rows}", experiment.model, lambda: calibrate(experiment.model, self.compute.dtype, batch, MEASURE)
        )
        epochs = opened.epochs(experiment.steps * experiment.data.batch)
        made = Planned(
            hash=cell.hash,
            label=cell.label,
            steps=experiment.steps,
            seed=experiment.seed,
            params=parameter_count(experiment.model),
            tokens=total,
            flops=float(flops * total),
            unique_tokens=float(total / max(1.0, epochs)),
            sizes={
                "params_nonembedding": nonembedding_count(experiment.model),
                "vocab": experiment.model.vocab,
                "width": experiment.model.width,
                "layers": len(list(experiment.model.blocks())),
                "length": experiment.data.length,
            },
            seconds=total / speed.tokens_per_second(flops),
            memory=memory.total,
            tags=dict(cell.tags),
            rung=None if cell.rung is None else dataclasses.asdict(cell.rung),
            held_out=held_out,
            shape=shape_of(to_json(experiment)),
            code=code,
        )
        return made, self.once("change", of_step, lambda: self.mend(trained, memory.total))

    def mend(self, experiment: Experiment, memory: float) -> str | None:
        if memory <= self.limit:
            return None
        change = one_change(experiment, self.compute, self.mesh, self.limit)
        return f"{change.setting} would fit ({change.cost})" if change else "choose a smaller model"


def _types(described: Any) -> list[str]:
    """Names of the types and functions in JSON of an experiment."""
    if isinstance(described, Mapping):
        here = [described[key] for key in ("$type", "$function") if key in described]
        return here + [name for value in described.values() for name in _types(value)]
    return [name for value in described for name in _types(value)] if isinstance(described, list) else []


def _trusted(name: str) -> bool:
    return name.partition(":")[0].split(".")[0] in TRUSTED


def as_json(plan: Plan) -> str:
    """The plan, for `--json`."""
    cells = [dataclasses.asdict(cell) for cell in plan.folder.cells]
    return json.dumps({"name": plan.folder.name, "cells": cells, "warnings": plan.warnings, "refused": plan.too_large})
