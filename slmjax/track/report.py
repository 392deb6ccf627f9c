"""`report.html` of a run folder: one file, no network, no script, readable in light and dark.

It is written from config.json, metrics.jsonl, ledger.jsonl, environment.json and energy.json alone, so it can be
written again at any time, also for a run that still trains or has been moved to another machine.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from slmjax.errors import StorageError
from slmjax.files import write_text
from slmjax.track import jsonl
from slmjax.track.chart import Series, chart
from slmjax.track.ledger import attempts, state_of
from slmjax.track.page import cards, page, table
from slmjax.track.progress import duration, si
from slmjax.track.tracker import Tracker

Rows = Sequence[Mapping[str, Any]]

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorstore", "grain", "wandb")
"""Packages that are listed; environment.json has all"""


def write(folder: str | Path) -> Path:
    """Writes `report.html` in a run folder, and returns its path.

    Raises:
        StorageError: the folder holds no run, its records are damaged, or the report cannot be written.
    """
    folder = Path(folder)
    target = folder / "report.html"
    text = render(folder)
    write_text(target, text)
    return target


def render(folder: Path) -> str:
    """The page. Raises StorageError where the folder holds no run or its records are damaged."""
    if not (folder / "config.json").is_file():
        raise StorageError(f"{folder} holds no run (no config.json); give the folder that training wrote to")
    config, environment, energy = (_json(folder / f"{n}.json") for n in ("config", "environment", "energy"))
    rows, events = jsonl.read(folder / "metrics.jsonl"), jsonl.read(folder / "ledger.jsonl")
    experiment = config.get("experiment", {})
    name, state = str(experiment.get("name", folder.name)), state_of(events)
    sections = [
        _numbers(rows, experiment, energy),
        _charts(rows),
        '<div class="tables">',
        table("Validation", _evaluations(rows), head=("step", "loss ± standard error", "perplexity", "tokens")),
        table("Energy", _energy(energy)),
        table("Experiment", _experiment(experiment)),
        table("Data", _data(config)),
        table("Environment", _environment(environment)),
        table("What happened", _events(events), head=("when", "event", "")),
        "</div>",
    ]
    fingerprint = str(config.get("fingerprint", ""))
    about = f'fingerprint <code title="{escape(fingerprint)}">{escape(fingerprint[:12])}</code>{_when(events)}'
    return page(name, about, "".join(sections), f"slmjax {config.get('slmjax', '')}, report", state=state)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _column(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have the metric."""
    pairs = [(float(r["step"]), float(r[name])) for r in rows if isinstance(r.get(name), int | float)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _median(values: Sequence[float]) -> float | None:
    """Of a run, without its first steps where there are enough: they compile and warm up."""
    settled = values[3:] if len(values) > 8 else values
    return statistics.median(settled) if settled else None


def _numbers(rows: Rows, experiment: Mapping[str, Any], energy: Mapping[str, Any]) -> str:
    """The cards at the top."""
    found: list[tuple[str, str, str]] = []
    steps, losses = _column(rows, "loss")
    if losses:
        of = experiment.get("steps")
        last = losses[-min(20, len(losses)) :]
        found.append(("training loss", f"{statistics.fmean(last):.3f}", f"mean of the last {len(last)} rows"))
        found.append(("steps", f"{int(steps[-1]):,}", f"of {of:,}" if isinstance(of, int) else ""))
    at, validation = _column(rows, "validation/loss")
    if validation:
        best = min(range(len(validation)), key=validation.__getitem__)
        found.insert(
            0, ("validation loss", f"{validation[-1]:.3f}", f"best {validation[best]:.3f} at {int(at[best]):,}")
        )
    _, tokens = _column(rows, "tokens")
    if tokens:
        _, epochs = _column(rows, "epoch")
        found.append(("tokens", si(tokens[-1]).strip(), f"{epochs[-1]:.2f} epochs" if epochs else ""))
    speed = _median(_column(rows, "tokens_per_second")[1])
    if speed:
        mfu = _median(_column(rows, "mfu")[1])
        found.append(("tokens a second", si(speed).strip(), f"median; MFU {mfu:.1%}" if mfu else "median"))
    if rows:
        memory = max(_column(rows, "memory_bytes")[1], default=0)
        note = f"peak memory {memory / 2**30:.2f} GiB" if memory else ""
        found.append(("training time", duration(rows[-1]["elapsed"]), note))
    if energy:
        note = f"{'estimate' if energy['estimate'] else 'measured'}; {energy['co2e_kg'] * 1000:.2g} g CO2e"
        found.append(("energy", kwh(energy["kwh"]), note))
    return cards(found)


def _charts(rows: Rows) -> str:
    validation = _column(rows, "validation/loss")
    charts = (
        chart("Loss", [Series("training", *_column(rows, "loss")), Series("validation", *validation, dots=True)]),
        chart("Learning rate", [Series("lr", *_column(rows, "lr"))], from_zero=True),
        chart("Tokens a second", [Series("tokens/s", *_column(rows, "tokens_per_second"))], from_zero=True),
        chart("Gradient norm, before clipping", [Series("norm", *_column(rows, "grad_norm"))], from_zero=True),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _evaluations(rows: Rows) -> Iterable[tuple[str, ...]]:
    evaluated = [r for r in rows if "validation/loss" in r]
    least = min((r["validation/loss"] for r in evaluated), default=None)
    shown = (
        evaluated if len(evaluated) <= 12 else [r for r in evaluated if r["validation/loss"] == least] + evaluated[-11:]
    )
    for row in dict.fromkeys(map(id, shown)):
        r = next(r for r in shown if id(r) == row)
        best = " (best)" if r["validation/loss"] == least and len(evaluated) > 1 else ""
        error = f" ± {r['validation/loss_se']:.4f}" if "validation/loss_se" in r else ""
        tokens = si(r["tokens"]).strip() if "tokens" in r else ""
        yield (
            f"{r['step']:,}",
            f"{r['validation/loss']:.4f}{error}{best}",
            f"{r['validation/perplexity']:.2f}" if "validation/perplexity" in r else "",
            tokens,
        )


def _energy(energy: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if not energy:
        return
    kind = "an estimate, not a measurement" if energy["estimate"] else "measured"
    yield "energy", f"{kwh(energy['kwh'])} over {duration(energy['seconds'])}: {kind}"
    for name, part in energy["parts"].items():
        yield name, f"{kwh(part['kwh'])}, {part['method']}: {part['detail']}"
    grid = energy["grid"]
    yield "PUE", f"{energy['pue']:g}"
    yield "grid", f"{grid['g_per_kwh']:g} gCO2e/kWh, {grid['zone']} {grid['year']} ({grid['source']})"
    yield "emissions", f"{energy['co2e_kg'] * 1000:.3g} g CO2e, derived"


def kwh(value: float) -> str:
    """0.0042 -> `4.2 Wh`."""
    for most, unit, each in ((1e-4, "mWh", 1e6), (0.1, "Wh", 1e3)):
        if value < most:
            return f"{value * each:.3g} {unit}"
    return f"{value:.3g} kWh"


def _experiment(experiment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in experiment.items():
        if name not in ("$type", "name", "data"):
            yield name, _formatted(value)


def _data(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for store in config.get("stores", ()):
        yield str(store["name"]), f"{store['location']}, fingerprint {str(store.get('fingerprint'))[:12]}"
    for name, value in (config.get("experiment", {}).get("data") or {}).items():
        if name != "$type":
            yield name, _formatted(value)


def _formatted(value: Any) -> str:
    """A value of config.json as Python would write it."""
    if isinstance(value, Mapping):
        fields = ", ".join(f"{k}={_formatted(v)}" for k, v in value.items() if not k.startswith("$"))
        kind = value.get("$type") or value.get("$function") or ""
        return f"{str(kind).rpartition(':')[2]}({fields})" if "$type" in value else str(kind).rpartition(":")[2]
    if isinstance(value, list):
        return f"({', '.join(map(_formatted, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in ("command", "platform", "cpu", "cores", "python"):
        if environment.get(name):
            yield name, str(environment[name])
    if environment.get("devices"):
        devices = environment["devices"]
        yield "devices", ", ".join(f"{devices.count(d)} × {d}" for d in dict.fromkeys(devices))
    git = environment.get("git")
    if git:
        dirty = len(git.get("dirty", ()))
        yield "git commit", f"{git['commit'][:12]}{f', {dirty} files changed (git.diff)' if dirty else ', clean'}"
    packages = environment.get("packages", {})
    yield "packages", ", ".join(f"{name} {packages[name]}" for name in SHOWN if name in packages)


def _events(events: Rows) -> Iterable[tuple[str, str, str]]:
    events = [e for e in events if e["event"] != "evaluated"]
    for event in [*events[:4], *events[-16:]] if len(events) > 20 else events:
        at = datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        rest = {k: v for k, v in event.items() if k in ("step", "loss", "grad_norm", "reason")}
        yield at, event["event"], ", ".join(f"{k} {_formatted(v)}" for k, v in rest.items())


def _when(events: Rows) -> str:
    if not events:
        return ""
    first = datetime.fromtimestamp(events[0]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = attempts(events)
    return f", made {first}{f', started {count} times' if count > 1 else ''}"


class Report(Tracker):
    """The tracker that writes the report: every few minutes in the background, and at the end."""

    def __init__(self, folder: str | Path, *, every: float = 300.0, say: Callable[[str], None] = print):
        """`every`: seconds between two versions."""
        self.folder, self._every, self._say = Path(folder), every, say
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if time.monotonic() - self._last >= self._every and not (self._thread and self._thread.is_alive()):
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._write, name="report", daemon=True)
            self._thread.start()

    def finish(self, status: str) -> None:
        if self._thread:
            self._thread.join(60)
        self._write()

    def _write(self) -> None:
        """A report that cannot be written does not stop the run: it can be written later from the same files."""
        try:
            write(self.folder)
        except Exception as error:
            self._say(f"report.html is not written: {error}")
