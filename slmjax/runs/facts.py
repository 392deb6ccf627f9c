"""What a run's own records say of its model, for the model card. Nothing that is not written down is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmjax.config import Experiment
from slmjax.convert.card import Energy, Facts, Mixed, Result, Source
from slmjax.data.token_store import TokenStore
from slmjax.errors import DataError
from slmjax.models.flops import flops_per_token
from slmjax.track.jsonl import read


def collect(run: Path, experiment: Experiment, *, step: int, name: str, licence: str | None) -> Facts:
    """The facts of the model of a run after `step` steps.

    Sizes and formats of the model are filled in by `convert.export`.
    """
    config, environment = _json(run / "config.json"), _json(run / "environment.json")
    git = environment.get("git") or {}
    stores = _stores(config)
    data = experiment.data
    tokens = step * data.batch * data.length
    each = flops_per_token(experiment.model, data.length, experiment.objective.predicted).attention
    return Facts(
        name=name,
        licence=licence,
        sources=tuple(source for store in stores for source in _sources(store.manifest)),
        mixture=_mixture(experiment, config),
        tokens=tokens or None,
        steps=step or None,
        flops=float(tokens * each) or None,
        flops_convention="forward and backward, attention and output head counted",
        energy=_energy(_json(run / "energy.json")),
        hardware=_hardware(environment),
        results=_results(run, step),
        fingerprint=config.get("fingerprint"),
        data_fingerprints=tuple(store.fingerprint for store in stores),
        commit=git.get("commit"),
        changed=bool(git.get("dirty")),
    )


def _stores(config: dict[str, Any]) -> list[TokenStore]:
    """The token stores of the run that are still where they were, each once."""
    opened = (_opened(described) for described in config.get("stores", ()))
    return list({store.fingerprint: store for store in opened if store is not None}.values())


def _opened(described: dict[str, Any]) -> TokenStore | None:
    try:
        return TokenStore(described["location"])
    except DataError:
        return None


def _mixture(experiment: Experiment, config: dict[str, Any]) -> tuple[Mixed, ...]:
    """The parts of the training data whose stores are still where they were. A run's stores begin with these."""
    parts = experiment.data.train
    total = sum(part.weight for part in parts)
    return tuple(
        Mixed(name=store.name, tokens=store.count("train", "tokens"), share=part.weight / total)
        for part, described in zip(parts, config.get("stores", ()), strict=False)
        if (store := _opened(described)) is not None
    )


def _sources(manifest: dict[str, Any]) -> list[Source]:
    return [
        Source(
            name=source["name"],
            licence=source.get("licence"),
            url=origin if (origin := str(source.get("origin") or "")).startswith("https://") else None,
            documents=source.get("documents_kept"),
        )
        for source in manifest.get("sources", ())
    ]


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


def _results(run: Path, step: int) -> tuple[Result, ...]:
    """The last validation loss up to this step, with its standard error where the run knows it."""
    rows = read(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    known = [row for row in rows if row.get("step", 0) <= step and "validation/loss" in row]
    if not known:
        return ()
    row = known[-1]
    where = f"validation split, after step {row['step']}"
    error = row.get("validation/loss_se")
    return (
        Result(
            metric="loss (nats a token)",
            value=float(row["validation/loss"]),
            standard_error=None if error is None else float(error),
            data=where,
        ),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
