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
from slmjax.track.wandb_run import Mode, Server, WandbRun


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
    sizes: Mapping[str, float] | None = None,
    among: int = 1,
    server: Server | None = None,
) -> tuple[Trackers, Progress]:
    """Everything that records a run: ledger, metrics.jsonl, energy, progress, W&B and report, in its folder.

    Begins an attempt in the ledger. `config` is the content of config.json; the `Progress` is returned for its `say`.

    Args:
        tags: of W&B. Those that read `name=value` are also its config, as `cell.name`.
        sizes: of the run, such as its FLOPs: the summary of W&B.
        among: runs that this process trains together, this one included: it is charged its share of the energy, and
            its lines begin with its name.
        server: the W&B server, shared by those runs.

    Raises:
        StorageError: the folder cannot be written, or its records are damaged.
    """
    folder = Path(folder)
    experiment = config.get("experiment", {})
    name = str(experiment.get("name", folder.name))
    ledger = Ledger(folder / "ledger.jsonl")
    if not ledger.events():
        ledger.append("created", name=name, fingerprint=config.get("fingerprint"))
    ledger.append("started", **({"among": among} if among > 1 else {}))
    metrics = Metrics(folder / "metrics.jsonl")
    progress = Progress(steps, folder / "log.txt", name=name if among > 1 else "")
    wandb_run = WandbRun(
        folder,
        mode=wandb,
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        name=name,
        config={**config, "environment": environment, **_parameters(tags)},
        summary=sizes,
        artifacts=artifacts,
        say=progress.say,
        server=server,
    )
    energy = Energy(folder / "energy.json", pue=pue, country=country, share=1 / among)
    # They finish in this order: the report reads what the first three wrote, and the terminal is released last.
    trackers = Trackers(
        metrics=metrics, ledger=ledger, energy=energy, report=Report(folder), wandb=wandb_run, progress=progress
    )
    return trackers, progress


def _parameters(tags: Sequence[str]) -> dict[str, Any]:
    """Tags `name=value` as the `cell` of W&B's config, which its tables and charts read; numbers as numbers."""
    pairs = [tag.partition("=") for tag in tags if "=" in tag]
    return {"cell": {name: _number(value) for name, _, value in pairs}} if pairs else {}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
