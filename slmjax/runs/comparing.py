"""What is known about runs and quantized folders, for a page that compares them (`track.comparison`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmjax.config import Experiment
from slmjax.errors import StorageError, UserError
from slmjax.experiment_file import load_config
from slmjax.files import at
from slmjax.runs import carriers, cost, packed_folder
from slmjax.runs import folder as runs
from slmjax.serialise import from_json
from slmjax.track import jsonl
from slmjax.track.comparison import Entry

MEASURED = "measured.json"
"""In a folder of `slmjax quantize`: the loss before and after, on how many held-out tokens"""


def entry(folder: str | Path) -> Entry:
    """A run, or a folder that `slmjax quantize` wrote.

    Raises:
        UserError: it is neither.
        StorageError: its records are damaged.
    """
    folder = at(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; expected a run folder, or one that slmjax quantize wrote") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if packed_folder.KEY in config:
        return _packed(folder, config)
    experiment: Experiment = from_json(load_config(folder / "config.json")["experiment"])
    spent = cost.read(folder, experiment)
    return Entry(
        folder=str(folder),
        experiment=config["experiment"],
        rows=jsonl.read(folder / "metrics.jsonl"),
        flops_per_token=spent.total,
        teaching_share=spent.beside / spent.total,
        sizes=_sizes(experiment),
    )


def record(folder: Path, before: Any, after: Any) -> None:
    """Writes `MEASURED`. `before`, `after`: what `runs.evaluating.measure` gives."""
    found = {
        "loss": after.loss.value,
        "loss_se": after.loss.se,
        "loss_before": before.loss.value,
        "tokens": after.tokens,
    }
    runs.write_json(folder / MEASURED, found)


def _sizes(experiment: Experiment) -> dict[str, int]:
    return {f"exported to {name}": size.bytes for name, size in carriers.sizes(experiment).items()}


def _packed(folder: Path, config: dict[str, Any]) -> Entry:
    try:
        loss = json.loads((folder / MEASURED).read_text("utf-8"))["loss"]
    except (OSError, ValueError, KeyError):
        loss = None
    about = {"name": folder.name, **config.get("quantized", {}), "of": config.get("imported", {}).get("folder")}
    size = (folder / packed_folder.WEIGHTS).stat().st_size
    return Entry(folder=str(folder), experiment=about, sizes={"written by slmjax quantize": size}, loss=loss)
