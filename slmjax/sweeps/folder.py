"""The folder of a sweep, and the state of each of its cells, which is read from the records of the runs.

    sweep.json        the cells with their sizes and estimates
    cells/HASH.json   the experiment of a cell, which `slmjax train` takes
    runs/HASH/        its run folder; logs/HASH.log: what it printed; claims/HASH.lock: held while it
                      runs, with a lease
    ledger.jsonl      what happened to the cells
    results.tsv       a row for each cell that ended, for `slmjax fit`
    predictions.json  what was predicted of the held-out cell before it ran

Nothing here imports jax: a process that watches runs must not take their device.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax.errors import StorageError, UserError
from slmjax.files import write_text
from slmjax.lease import held, lease
from slmjax.serialise import fingerprint
from slmjax.track import jsonl
from slmjax.track.ledger import state_of

FILE = "sweep.json"
RESULTS = "results.tsv"
COLUMNS = ("params", "tokens", "flops", "loss", "loss_se", "seed", "status", "seconds", "unique_tokens")
SIZES = ("params_nonembedding", "vocab", "width", "layers", "length")
"""Columns of results.tsv, besides those of the tags; `SIZES` are those of the conventions of FLOPs"""
ENDED = ("complete", "diverged", "dropped")
"""States in which a cell needs no more work; a failed one is tried again by the next `slmjax sweep run`"""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell as sweep.json has it."""

    hash: str
    label: str
    steps: int
    seed: int
    params: int
    tokens: int
    flops: float
    """Of the run, by convention (iii): head and attention counted"""
    unique_tokens: float
    """Fewer than `tokens` if the run sees data twice"""
    sizes: Mapping[str, int]
    """`SIZES`"""
    seconds: float
    """Estimated time of training"""
    memory: float
    """Estimated bytes at the worst moment of a step"""
    tags: Mapping[str, Any] = field(default_factory=dict)
    rung: Mapping[str, Any] | None = None
    held_out: bool = False
    shape: str = ""
    """Cells with the same one may train together as one program; empty: it trains alone"""
    trunk: str = ""
    """Hash of the cell whose checkpoint it goes on from; empty: it begins at step 0"""
    shared: int = 0
    """Steps that it shares with that cell"""
    keep: int = 0
    """A step whose checkpoint other cells go on from; 0: none"""
    code: bool = False
    """Whether it has types that the sweep's file, or one beside it, defines"""

    @property
    def own(self) -> float:
        """The share of its steps that it trains itself."""
        return 1 - self.shared / self.steps


@dataclass(frozen=True, kw_only=True)
class State:
    """Of a cell."""

    name: str
    """waiting, running, complete, diverged, failed, or dropped (by successive halving, or as the fit is good enough)"""
    step: int = 0
    loss: float = math.nan
    """Of the validation after the last step"""
    loss_se: float = math.nan
    seconds: float = 0.0
    """Of training, so far; of a run that trained with others, its share"""
    reason: str = ""


@dataclass(frozen=True)
class Folder:
    """A sweep that was planned.

    Attributes:
        source: the Python file it came from, or "".
        data_dir: where the cells find prepared data.
        device: kind of device that the plan was made for: cpu, gpu, tpu.
        memory: bytes of a device.
        coupled: `Sweep.coupled`.
    """

    path: Path
    name: str
    cells: tuple[Planned, ...]
    source: str = ""
    data_dir: str = "runs/data"
    device: str = "cpu"
    memory: float = math.inf
    coupled: bool = False

    def config(self, cell: Planned) -> Path:
        return self.path / "cells" / f"{cell.hash}.json"

    def run(self, cell: Planned) -> Path:
        return self.path / "runs" / cell.hash

    def log(self, cell: Planned) -> Path:
        return self.path / "logs" / f"{cell.hash}.log"

    def claim(self, cell: Planned) -> Path:
        return self.path / "claims" / f"{cell.hash}.lock"

    @property
    def held_out(self) -> Planned | None:
        return next((cell for cell in self.cells if cell.held_out), None)

    def events(self) -> list[dict[str, Any]]:
        return jsonl.read(self.path / "ledger.jsonl")

    def append(self, event: str, cell: Planned, **fields: Any) -> None:
        """Writes what happened to a cell, on disk before this returns. Several processes may do so."""
        about = {"time": round(time.time(), 3), "cell": cell.hash, "host": platform.node(), "pid": os.getpid()}
        busy = StorageError(f"{self.path / 'ledger.jsonl'} is held by another process for a minute; end that process")
        with lease(self.path / "claims" / "ledger.lock", lambda _: busy, wait=60):
            lines = jsonl.JsonLines(self.path / "ledger.jsonl", durable=True)
            try:
                lines.append({"event": event, **about, **fields})
            finally:
                lines.close()

    def check(self) -> None:
        """
        Raises:
            UserError: the file of a cell is missing or has been changed since the plan.
        """
        for cell in self.cells:
            file = self.config(cell)
            experiment = read_json(file).get("experiment", {})
            if fingerprint({k: v for k, v in experiment.items() if k != "name"})[: len(cell.hash)] != cell.hash:
                raise UserError(f"{file} has been changed since the plan; plan the sweep again in another folder")

    def states(self) -> dict[str, State]:
        """By the hash of each cell."""
        events = self.events()
        found = {cell.hash: self._state(cell, [e for e in events if e["cell"] == cell.hash]) for cell in self.cells}
        return found | {cell.hash: State(name="dropped") for cell in dropped(self.cells, found)}

    def _state(self, cell: Planned, events: Sequence[Mapping[str, Any]]) -> State:
        run = self.run(cell)
        own = jsonl.read(run / "ledger.jsonl")
        row = _newest(run / "metrics.jsonl")
        among = next((e.get("among", 1) for e in reversed(own) if e["event"] == "started"), 1)
        # The rows of the steps that it shares with another cell are that cell's.
        before = next((e["elapsed"] for e in reversed(own) if e["event"] == "created" and "elapsed" in e), 0.0)
        seconds = (row["elapsed"] - before) / among if row else 0.0
        about: dict[str, Any] = {"step": int(row["step"]), "seconds": seconds} if row else {}
        last = events[-1] if events else {}
        state = state_of(own)
        reason = str(last.get("reason") or next((e["reason"] for e in reversed(own) if "reason" in e), ""))
        # A process that was killed after its last checkpoint leaves a run that is complete without saying so.
        if state == "complete" or last.get("event") == "complete":
            if about.get("step") != cell.steps or "validation/loss" not in row:
                return State(name="failed", reason="there is no validation loss after its last step", **about)
            loss, error = float(row["validation/loss"]), float(row.get("validation/loss_se", math.nan))
            if not math.isfinite(loss):
                return State(name="diverged", reason=f"the last validation loss is {loss}", **about)
            return State(name="complete", loss=loss, loss_se=error, **about)
        if "diverged" in (state, last.get("event")):
            return State(name="diverged", reason=reason, **about)
        if held(self.claim(cell)):
            return State(name="running", **about)
        if last.get("event") == "skipped":
            return State(name="dropped", reason=reason)
        if last.get("event") == "failed" or (state == "failed" and last.get("event") != "stopped"):
            return State(name="failed", reason=reason, **about)
        return State(name="waiting", **about)

    def write_results(self) -> Path:
        """Writes results.tsv: a row for each cell that ended."""
        states = self.states()
        tags = dict.fromkeys(
            name for cell in self.cells for name in cell.tags if name not in (*COLUMNS, *SIZES)
        )  # fmt: skip
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow([*COLUMNS, *SIZES, *tags, "cell"])
        for cell in self.cells:
            state = states[cell.hash]
            if state.name in ("complete", "diverged", "failed"):
                known = {**vars(cell), **cell.sizes, **vars(state), "status": status(cell, state)}
                values = [known[name] for name in (*COLUMNS, *SIZES)]
                table.writerow([_cell(v) for v in (*values, *(cell.tags.get(name, "") for name in tags), cell.hash)])
        target = self.path / RESULTS
        write_text(target, text.getvalue())
        return target


def status(cell: Planned, state: State) -> str:
    """As results.tsv has it: `slmjax fit` leaves out all rows but those that are done."""
    return state.name if state.name != "complete" else "held out" if cell.held_out else "done"


def dropped(cells: Sequence[Planned], states: Mapping[str, State]) -> list[Planned]:
    """Cells of successive halving whose candidate was not good enough in the round before, once that has ended."""
    out: list[Planned] = []
    gone: set[str] = set()
    for cell in sorted((c for c in cells if c.rung), key=lambda c: c.rung["round"] if c.rung else 0):
        rung = cell.rung or {}
        before = [
            c for c in cells if c.rung and c.rung["group"] == rung["group"] and c.rung["round"] == rung["round"] - 1
        ]
        running = [c for c in before if c.hash not in gone]
        if any(states[c.hash].name not in ENDED for c in running):
            continue
        done = [c for c in running if states[c.hash].name == "complete"]
        best = sorted(done, key=lambda c: (states[c.hash].loss, c.hash))[: rung["best"]]
        if before and rung["candidate"] not in {c.rung["candidate"] for c in best if c.rung}:
            out.append(cell)
            gone.add(cell.hash)
    return out


def ready(cells: Sequence[Planned], states: Mapping[str, State]) -> list[Planned]:
    """Cells that may run now, the cheapest first: those whose round of successive halving has come, those whose trunk
    has ended or failed, and the held-out one when all others have ended."""
    open_rounds: dict[str, int] = {}
    for cell in cells:
        if cell.rung and states[cell.hash].name not in ENDED:
            group = cell.rung["group"]
            open_rounds[group] = min(open_rounds.get(group, cell.rung["round"]), cell.rung["round"])
    others = all(states[cell.hash].name in ENDED for cell in cells if not cell.held_out)
    return sorted(
        (
            cell
            for cell in cells
            if states[cell.hash].name in ("waiting", "failed")
            and (others or not cell.held_out)
            and (not cell.trunk or states[cell.trunk].name in (*ENDED, "failed"))
            and (cell.rung is None or cell.rung["round"] == open_rounds[cell.rung["group"]])
        ),
        key=lambda cell: cell.flops,
    )


def read(path: str | Path) -> Folder:
    """
    Raises:
        UserError: the folder holds no sweep, or one of another version.
    """
    path = Path(path)
    if not (path / FILE).is_file():
        raise UserError(f"{path}: not a sweep's folder (no {FILE}); make one with slmjax sweep plan FILE --out {path}")
    data = read_json(path / FILE)
    try:
        cells = tuple(Planned(**cell) for cell in data["cells"])
        about = {name: data[name] for name in ("device", "memory", "coupled") if name in data}
        return Folder(path, data["name"], cells, data["source"], data["data_dir"], **about)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / FILE} was written by another version of slmjax ({error}); plan it again") from None


def save(folder: Folder, experiments: Mapping[str, Any]) -> None:
    """Writes the plan: sweep.json last, so that a folder with it is whole.

    Args:
        experiments: of each cell by its hash, as JSON.

    Raises:
        UserError: the folder holds another sweep, or something else.
        StorageError: it cannot be written.
    """
    refuse_other(folder)
    try:
        for name in ("cells", "runs", "logs", "claims"):
            (folder.path / name).mkdir(parents=True, exist_ok=True)
        for cell in folder.cells:
            write_text(folder.config(cell), json.dumps({"experiment": experiments[cell.hash]}, indent=1) + "\n")
        data = {
            "format": 1,
            "name": folder.name,
            "source": folder.source,
            "data_dir": folder.data_dir,
            "device": folder.device,
            **({"coupled": True} if folder.coupled else {}),
            **({"memory": folder.memory} if math.isfinite(folder.memory) else {}),
            "cells": [dataclasses.asdict(cell) for cell in folder.cells],
        }
        write_text(folder.path / FILE, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{folder.path}: the sweep cannot be written ({error.strerror or error})") from None


def refuse_other(folder: Folder) -> None:
    """Raises UserError if the folder holds another sweep or other files; cells may be added to the same sweep."""
    path = folder.path
    if (path / FILE).is_file():
        old = read(path)
        gone = {cell.hash for cell in old.cells} - {cell.hash for cell in folder.cells}
        if old.name != folder.name or gone:
            raise UserError(
                f"{path} holds another sweep: {old.name!r}, of which {len(gone)} of {len(old.cells)} cells are not in "
                f"{folder.name!r}; choose another --out"
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is no sweep's folder (no {FILE}); choose another --out")


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); plan the sweep again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is no JSON object; plan the sweep again")
    return data


def _newest(file: Path) -> Mapping[str, Any]:
    """The last row of a run's metrics; {} if there is none. A file is read again only when it has changed."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return {}
    return _last_row(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _last_row(file: Path, size: int, changed: int) -> Mapping[str, Any]:
    return next(reversed(jsonl.read(file)), {})


def _cell(value: Any) -> str:
    """A number with the digits that give it back; nothing for what is not known."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return " ".join(str(value).split())
