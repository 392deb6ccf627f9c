"""Several trackers as one, and the trackers of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.track.energy import Energy
from slmjax.track.jsonl import Metrics
from slmjax.track.ledger import Ledger
from slmjax.track.progress import Progress
from slmjax.track.report import Report
from slmjax.track.tracker import Tracker
from slmjax.track.wandb_run import Mode, WandbRun


class Trackers(Tracker):
    """Passes each call on to every tracker; `state` is a dict by the trackers' names."""

    def __init__(self, **trackers: Tracker):
        self.trackers = trackers

    def resume(self, step: int) -> None:
        for tracker in self.trackers.values():
            tracker.resume(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self.trackers.values():
            tracker.log(step, metrics)

    def artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        for tracker in self.trackers.values():
            tracker.artifact(path, kind, metadata)

    def state(self) -> dict[str, Any]:
        return {name: state for name, tracker in self.trackers.items() if (state := tracker.state())}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, tracker in self.trackers.items():
            if name in state:
                tracker.restore(state[name])

    def finish(self, status: str) -> None:
        """Finishes every tracker, even if one fails; the first failure is raised afterwards."""
        failures = []
        for tracker in self.trackers.values():
            try:
                tracker.finish(status)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def open_trackers(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    steps: int,
    wandb: Mode = "auto",
    project: str = "slmjax",
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    artifacts: bool = False,
    pue: float = 1.0,
    country: str = "",
) -> tuple[Trackers, Progress]:
    """Everything that records a run: ledger, metrics.jsonl, energy, progress, W&B and report, in its folder.

    Begins an attempt in the ledger. `config` is the content of config.json; the `Progress` is returned for its `say`.

    Raises:
        StorageError: the folder cannot be written, or its records are damaged.
    """
    folder = Path(folder)
    experiment = config.get("experiment", {})
    name = str(experiment.get("name", folder.name))
    ledger = Ledger(folder / "ledger.jsonl")
    if not ledger.events():
        ledger.append("created", name=name, fingerprint=config.get("fingerprint"))
    ledger.append("started")
    metrics = Metrics(folder / "metrics.jsonl")
    progress = Progress(steps, folder / "log.txt")
    wandb_run = WandbRun(
        folder,
        mode=wandb,
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        name=name,
        config={**config, "environment": environment},
        artifacts=artifacts,
        say=progress.say,
    )
    energy = Energy(folder / "energy.json", pue=pue, country=country)
    # They finish in this order: the report reads what the first three wrote, and the terminal is released last.
    trackers = Trackers(
        metrics=metrics, ledger=ledger, energy=energy, report=Report(folder), wandb=wandb_run, progress=progress
    )
    return trackers, progress
