"""What a token of training costs, in floating-point operations: a file of the run folder, written when it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from slmjax.config import Experiment
from slmjax.models.flops import flops_per_token
from slmjax.runs.folder import write_json

FILE = "cost.json"


class Cost(NamedTuple):
    """FLOPs for each token that is trained on."""

    model: float
    """Forward and backward pass of the model; attention and output head counted"""
    beside: float
    """What the objective computes in addition, such as forward passes of teachers, and text that is drawn"""

    @property
    def total(self) -> float:
        return self.model + self.beside


def of(experiment: Experiment) -> Cost:
    """Of an experiment whose objective has its models (`runs.teaching.with_models`)."""
    beside = experiment.objective.more_flops(experiment.model, experiment.data.length)
    return Cost(_model(experiment), float(beside))


def write(folder: Path, cost: Cost) -> None:
    """Records the cost in a run folder, so that it is known when the teachers are gone."""
    write_json(folder / FILE, {f"flops_per_token_{name}": value for name, value in cost._asdict().items()})


def read(folder: Path, experiment: Experiment) -> Cost:
    """Of the run in this folder; of the model alone, if the folder does not tell more."""
    try:
        beside = json.loads((folder / FILE).read_text("utf-8"))["flops_per_token_beside"]
    except (OSError, ValueError, KeyError):
        beside = 0.0
    return Cost(_model(experiment), float(beside))


def _model(experiment: Experiment) -> float:
    return float(flops_per_token(experiment.model, experiment.data.length, experiment.objective.predicted).attention)
