"""Facts about a model from the records of its run, for the model card. What is not recorded is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slmjax.config import Experiment
from slmjax.convert.card import Energy, Facts, Mixed, Result, Source
from slmjax.runs import cost
from slmjax.track.jsonl import read


def collect(run: Path, experiment: Experiment, *, step: int, name: str, licence: str | None) -> Facts:
    """The facts of the model of a run after `step` steps.

    Sizes and formats of the model are filled in by `convert.export`.
    """
    config, environment = _json(run / "config.json"), _json(run / "environment.json")
    git = environment.get("git") or {}
    stores, data = config.get("stores", []), experiment.data
    tokens = step * data.batch * data.length
    spent = cost.read(run, experiment)
    return Facts(
        name=name,
        licence=licence,
        sources=_sources(stores),
        mixture=_mixture(stores),
        tokens=tokens or None,
        steps=step or None,
        flops=tokens * spent.total or None,
        flops_convention="forward and backward, attention and output head counted"
        + (", teachers included" if spent.beside else ""),
        energy=_energy(_json(run / "energy.json")),
        hardware=_hardware(environment),
        results=_results(run, step, experiment.objective.unit),
        fingerprint=config.get("fingerprint"),
        data_fingerprints=tuple(dict.fromkeys(store["fingerprint"] for store in stores)),
        commit=git.get("commit"),
        changed=bool(git.get("dirty")),
    )


def _mixture(stores: list[dict[str, Any]]) -> tuple[Mixed, ...]:
    """The parts of the training data."""
    return tuple(
        Mixed(name=store["name"], tokens=store["tokens"], share=store["share"])
        for store in stores
        if store.get("share") is not None
    )


def _sources(stores: list[dict[str, Any]]) -> tuple[Source, ...]:
    """Where the text of all stores is from, each store once."""
    each = {store["fingerprint"]: store.get("sources", ()) for store in stores}
    return tuple(Source(**source) for sources in each.values() for source in sources)


def _energy(record: dict[str, Any]) -> Energy | None:
    if not record.get("kwh"):
        return None
    grid = record["grid"]
    return Energy(
        kwh=record["kwh"],
        method=record["method"],
        co2e_kg=record["co2e_kg"],
        grid=f"{grid['g_per_kwh']:g} g/kWh, {grid['zone']} {grid['year']}, {grid['source']}; PUE {record['pue']:g}",
    )


def _hardware(environment: dict[str, Any]) -> str | None:
    devices = environment.get("devices")
    if not devices:
        return None
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    return f"{kinds} ({environment.get('cpu')}, {environment.get('cores')} cores)"


def _results(run: Path, step: int, unit: str) -> tuple[Result, ...]:
    """The last validation loss up to this step, with its standard error if recorded; of a classifier also the accuracy,
    with the standard error of a proportion."""
    rows = read(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    evaluated = [row for row in rows if row.get("step", 0) <= step and "validation/loss" in row]
    if not evaluated:
        return ()
    row = evaluated[-1]
    where = f"validation split, after step {row['step']}"
    error = row.get("validation/loss_se")
    loss = Result(
        metric=f"loss (nats a {unit})",
        value=float(row["validation/loss"]),
        standard_error=None if error is None else float(error),
        data=where,
    )
    if unit != "text":
        return (loss,)
    accuracy, texts = float(row["validation/accuracy"]), float(row["validation/weight"])
    spread = math.sqrt(accuracy * (1 - accuracy) / texts)
    return Result(metric="accuracy", value=accuracy, standard_error=spread, data=where), loss


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
