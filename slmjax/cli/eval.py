"""`slmjax eval MODEL`: loss, perplexity and bits per byte on held-out text; of a classifier, accuracy."""

from __future__ import annotations

import functools
import json
import math
import shlex
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from slmjax.cli import tables
from slmjax.cli.args import parse

HELP = "loss, perplexity and bits per byte of a model, or accuracy of a classifier, with their errors"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint or a Hugging Face folder"""
    data: str | None = None
    """A token store, whose validation split is read, or of a classifier a file of labelled texts (.csv, .jsonl,
    .parquet); default: the validation data of the run"""
    batches: int | None = None
    """Batches to read; default: the whole split"""
    text: str = "text"
    """Column of the texts in the file, for a classifier that is not a run of slmjax"""
    label: str = "label"
    """Column of the labels, likewise"""
    length: int | None = None
    """Tokens a sequence; default: as in training, or the model's context up to 1024"""
    batch: int = 16
    """Sequences a batch"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""
    teacher: str | None = None
    """A model to compare with: the share of tokens where both find the same one likeliest, and the KL divergence;
    default: the teacher that the run names, if it is still there"""
    dtype: str | None = None
    """float32 or bfloat16; default: that of training on this machine"""
    json: bool = False
    """Print one JSON object instead of a table"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax eval",
        description="Loss (nats a token), perplexity and bits per byte on a validation split, with standard errors. "
        "Of a classifier: accuracy with its 95% interval (Wilson), and loss (nats a text).",
        example="slmjax eval runs/quickstart --batches 50\n"
        "  slmjax eval runs/quickstart/hf --data runs/data/english_classics\n"
        "  slmjax eval runs/student --teacher runs/teacher",
    )
    from rich.console import Console

    from slmjax.data.build_progress import show_progress
    from slmjax.runs.evaluating import HeldOut, compute_of, measure, opened
    from slmjax.runs.loading import load
    from slmjax.runs.teaching import compared, teacher_of

    errors = Console(stderr=True)
    loaded = load(args.model, step=args.step, say=errors.print)
    data = opened(
        HeldOut(data=args.data, batch=args.batch, length=args.length, text=args.text, label=args.label), loaded
    )
    labels = loaded.decoder.labels
    with show_progress() as progress:
        done = functools.partial(_show, progress, args.batches)
        result: Any = measure(loaded, data, batches=args.batches, compute=compute_of(args.dtype), progress=done)
    teacher = None if labels else teacher_of(loaded, args.teacher)
    found = compared(loaded, teacher, data, batches=args.batches, compute=compute_of(args.dtype)) if teacher else None
    if args.json:
        record = _labels_record(result, loaded, data) if labels else _record(result, loaded, data)
        print(json.dumps(record | _agreement_record(teacher, found)))
        return 0
    table = _labels_table(result, loaded, data) if labels else _table(result, loaded, data)
    if found is not None:
        table.add_row(f"same likeliest token as {teacher}", f"{found.same.value:.4f}", f"{found.same.se:.4f}")
        table.add_row("KL from it (nats a token)", f"{found.kl.value:.4f}", f"{found.kl.se:.4f}")
    tables.show(table)
    print(f"next:\n  slmjax {loaded.decoder.example.format(shlex.quote(args.model))}")
    return 0


def _record(result: Any, loaded: Any, opened: Any) -> dict[str, Any]:
    figures = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    out: dict[str, Any] = {"model": str(loaded.source), "step": loaded.step, "data": _held_out(opened)}
    for name, estimate in figures.items():
        if estimate is not None:
            out |= _figure(name, estimate)
    return out | {"tokens": result.tokens, "bytes": result.bytes, "sequences": result.sequences}


def _agreement_record(teacher: str | None, found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    return {"teacher": teacher} | _figure("same_as_teacher", found.same) | _figure("kl_from_teacher", found.kl)


def _figure(name: str, estimate: Any) -> dict[str, Any]:
    """A figure and its standard error for JSON, which has no nan."""
    return {name: estimate.value, f"{name}_se": None if math.isnan(estimate.se) else estimate.se}


def _show(progress: Any, batches: int | None, done: int) -> None:
    progress("batches", done, batches)


def _labels_record(result: Any, loaded: Any, opened: Any) -> dict[str, Any]:
    accuracy = result.accuracy
    return {
        "model": str(loaded.source),
        "step": loaded.step,
        "data": _held_out(opened),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        **_figure("loss", result.loss),
        "texts": result.texts,
    }


def _labels_table(result: Any, loaded: Any, opened: Any) -> Any:
    from rich.table import Table

    step = "" if loaded.step is None else f" after step {loaded.step}"
    table = Table(title=f"{loaded.source}{step} on {opened.name} (validation)", title_justify="left")
    for column in ("", "value", "error"):
        table.add_column(column, justify="right" if column else "left")
    accuracy = result.accuracy
    table.add_row("accuracy", f"{accuracy.value:.4f}", f"{accuracy.low:.4f} to {accuracy.high:.4f} (95%, Wilson)")
    table.add_row("loss (nats a text)", f"{result.loss.value:.4f}", f"{result.loss.se:.4f} (standard error)")
    table.caption = f"{result.texts:,} texts; labels: {', '.join(opened.labels)}"
    return table


def _held_out(opened: Any) -> list[str]:
    return [store.fingerprint for store in opened.stores if store.split == "validation"]


def _table(result: Any, loaded: Any, opened: Any) -> Any:
    from rich.table import Table

    step = "" if loaded.step is None else f" after step {loaded.step}"
    table = Table(title=f"{loaded.source}{step} on {opened.name} (validation)", title_justify="left")
    for column in ("", "value", "standard error"):
        table.add_column(column, justify="right" if column else "left")
    for name, estimate in (
        ("loss (nats a token)", result.loss),
        ("perplexity", result.perplexity),
        ("bits per byte", result.bits_per_byte),
    ):
        if estimate is not None:
            table.add_row(name, f"{estimate.value:.4f}", f"{estimate.se:.4f}")
    size = f"{result.bytes:,.0f} bytes, " if result.bytes else ""
    scored = "tokens" if loaded.decoder.causal else "masked tokens"
    table.caption = f"{result.tokens:,.0f} {scored}, {size}{result.sequences:,} sequences"
    return table
