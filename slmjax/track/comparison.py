"""A page that compares runs: loss against tokens, FLOPs, time and bytes on disk; one file, no network, no script.

Runs that differ in their seed alone are one line, the mean over the seeds, with a band of its 95% interval (Student's
t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from slmjax.errors import StorageError
from slmjax.estimate import half_width, mean
from slmjax.files import write_text
from slmjax.track.chart import Series, chart
from slmjax.track.page import page, table
from slmjax.track.progress import duration, si


class Entry(NamedTuple):
    """A run, or a model on disk whose loss is known."""

    folder: str
    experiment: Mapping[str, Any]
    """As in config.json; of a model that is no run, what describes it"""
    rows: Sequence[Mapping[str, Any]] = ()
    """Of metrics.jsonl"""
    flops_per_token: float | None = None
    """Of training, for each token: of the model, and of its teachers"""
    teaching_share: float = 0.0
    """Of these, the share of what is computed beside the model, such as forward passes of teachers"""
    sizes: Mapping[str, int] = {}
    """{format: bytes of all tensors}"""
    loss: float | None = None
    """Of a model that is no run; of a run it is in `rows`"""


class Group(NamedTuple):
    """Entries that differ in their seed alone."""

    name: str
    entries: tuple[Entry, ...]

    def losses(self, metric: str) -> list[float]:
        """The last loss of each entry that has one."""
        return [x for entry in self.entries if (x := final(entry, metric)) is not None]


def write(target: Path, entries: Sequence[Entry]) -> Path:
    """Writes the page, and returns its path.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(target, render(entries))
    return target


def final(entry: Entry, metric: str) -> float | None:
    """The last value of a metric."""
    values = [float(row[metric]) for row in entry.rows if isinstance(row.get(metric), int | float)]
    return values[-1] if values else entry.loss


def grouped(entries: Sequence[Entry]) -> list[Group]:
    """Entries by all but name and seeds; each group gets a short name of its own."""
    by: dict[str, list[Entry]] = {}
    for entry in entries:
        by.setdefault(repr(sorted(_leaves(_without_seeds(entry.experiment)).items())), []).append(entry)
    groups = [tuple(group) for group in by.values()]
    names = [str(group[0].experiment.get("name", "")) for group in groups]
    if len(set(names)) < len(names):
        names = _differences([_leaves(_without_seeds(group[0].experiment)) for group in groups], names)
    if len(set(names)) < len(names):
        names = [Path(group[0].folder).name for group in groups]
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def _without_seeds(experiment: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in experiment.items() if k not in ("name", "seed")}
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = {k: v for k, v in kept["data"].items() if k != "seed"}
    return kept


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{path: leaf} of JSON."""
    if isinstance(value, Mapping):
        return {k: x for key, v in value.items() for k, x in _leaves(v, f"{path}.{key}".lstrip(".")).items()}
    if isinstance(value, list | tuple):
        return {k: x for i, v in enumerate(value) for k, x in _leaves(v, f"{path}.{i}".lstrip(".")).items()}
    return {path: value}


def _differences(leaves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A name for each experiment from the fields in which they differ: `SEQ levels=4`."""
    every = dict.fromkeys(path for each in leaves for path in each)
    vary = [path for path in every if len({repr(each[path]) for each in leaves if path in each}) > 1]

    def said(path: str, value: Any) -> str:
        key = path.rpartition(".")[2]
        return str(value).rpartition(":")[2] if key.startswith("$") else f"{key}={value}"

    out = []
    for name, each in zip(names, leaves, strict=True):
        words = dict.fromkeys(said(path, each[path]) for path in vary if each.get(path) is not None)
        out.append(" ".join(words)[:70] or name)
    return out


def render(entries: Sequence[Entry]) -> str:
    """The page.

    Raises:
        StorageError: there is nothing to compare.
    """
    groups = grouped(entries)
    if not groups:
        raise StorageError("no run to compare")
    runs = [entry for entry in entries if entry.rows]
    evaluated = all(final(entry, "validation/loss") is not None for entry in runs)
    metric = "validation/loss" if evaluated else "loss"
    what = "validation loss" if evaluated else "training loss (not every run was evaluated)"
    numbered = [(f"{i} {group.name}", group) for i, group in enumerate(groups, start=1)]
    axes: tuple[tuple[str, str, Callable[[Entry, Mapping[str, Any]], float | None]], ...] = (
        ("tokens", "tokens", lambda entry, row: row.get("tokens")),
        (
            "training FLOPs",
            "FLOPs",
            lambda entry, row: (
                row["tokens"] * entry.flops_per_token if entry.flops_per_token and "tokens" in row else None
            ),
        ),
        ("wall-clock time", "minutes", lambda entry, row: row["elapsed"] / 60 if "elapsed" in row else None),
    )
    charts = [chart(f"Loss against {name}", _curves(numbered, metric, at), x_label=label) for name, label, at in axes]
    formats = dict.fromkeys(name for entry in entries for name in entry.sizes)
    for name in formats:
        points = list(_points(numbered, metric, name))
        charts.append(chart(f"Loss against bytes: {name}", points, x_label="bytes"))
    wide = (text.replace('class="chart"', 'class="chart wide"') for text in charts)
    about = f"{escape(what)}; bands and ± are 95% intervals of the mean over seeds, by Student's t"
    body = (
        f'<div class="charts">{"".join(wide)}</div><div class="tables">{_table(numbered, metric, list(formats))}</div>'
    )
    return page(f"{len(groups)} runs compared", about, body, "comparison")


def _curves(
    numbered: Iterable[tuple[str, Group]], metric: str, at: Callable[[Entry, Mapping[str, Any]], float | None]
) -> list[Series]:
    """Of each group, the mean over its runs at each step that all of them have."""
    out = []
    for name, group in numbered:
        points = [
            {
                row["step"]: (x, float(row[metric]))
                for row in entry.rows
                if metric in row and (x := at(entry, row)) is not None
            }
            for entry in group.entries
            if entry.rows
        ]
        steps = sorted(set.intersection(*map(set, points))) if points else []
        xs = [mean([each[step][0] for each in points]).value for step in steps]
        losses = [[each[step][1] for each in points] for step in steps]
        out.append(
            Series(
                name,
                xs,
                [mean(x).value for x in losses],
                dots=len(steps) <= 30,
                half_widths=[half_width(x) for x in losses],
                text=name.partition(" ")[0],
            )
        )
    return out


def _points(numbered: Iterable[tuple[str, Group]], metric: str, name: str) -> Iterable[Series]:
    """Of each group that the format holds: its bytes, and its loss at the end."""
    for label, group in numbered:
        sizes = [entry.sizes[name] for entry in group.entries if name in entry.sizes]
        losses = group.losses(metric)
        if sizes and losses:
            around = [half_width(losses)]
            yield Series(label, sizes[:1], [mean(losses).value], half_widths=around, text=label.partition(" ")[0])


def _table(numbered: Sequence[tuple[str, Group]], metric: str, formats: Sequence[str]) -> str:
    """The last losses, from the lowest."""

    def cells(label: str, group: Group) -> tuple[float, list[str]]:
        losses = group.losses(metric)
        last = [entry.rows[-1] for entry in group.entries if entry.rows]
        value, around = (mean(losses).value, half_width(losses)) if losses else (math.inf, math.nan)
        tokens, flops = (
            [row["tokens"] for row in last if "tokens" in row],
            [entry.flops_per_token for entry in group.entries if entry.flops_per_token],
        )
        return value, [
            label,
            str(len(group.entries)),
            "" if math.isinf(value) else f"{value:.4f}{'' if math.isnan(around) else f' ± {around:.4f}'}",
            si(tokens[0]).strip() if tokens else "",
            f"{tokens[0] * flops[0]:.3g}" if tokens and flops else "",
            f"{group.entries[0].teaching_share:.0%}" if group.entries[0].teaching_share else "",
            duration(mean([row["elapsed"] for row in last]).value) if last else "",
            *(next((f"{e.sizes[name]:,}" for e in group.entries if name in e.sizes), "") for name in formats),
        ]

    rows = sorted((cells(label, group) for label, group in numbered), key=lambda row: row[0])
    sizes = (f"bytes, {name}" for name in formats)
    head = ("", "seeds", "loss at the end", "tokens", "FLOPs", "of these, teachers", "time", *sizes)
    return table("Losses", [tuple(row) for _, row in rows], head)
