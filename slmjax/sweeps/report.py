"""`report.html` of a sweep: one file with its pictures inside, no network, no script."""

from __future__ import annotations

import base64
import json
import math
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from slmjax.errors import UserError
from slmjax.files import write_text
from slmjax.scaling.analysis import Analysis, Settings, analyse
from slmjax.scaling.conventions import CONVENTIONS
from slmjax.scaling.picture import draw
from slmjax.scaling.planning import roll_out
from slmjax.scaling.runs import read as read_runs
from slmjax.sweeps import predicting
from slmjax.sweeps.folder import RESULTS, Folder, Planned, State
from slmjax.track.page import cards, page, table
from slmjax.track.progress import duration, si

PICTURES = {
    "isoflop.png": "Loss over size at each budget, with the parabolas of approach 2",
    "loss.png": "Loss over compute, with the law's best",
    "residuals.png": "What the law does not explain",
    "profiles.png": "How well each parameter is determined",
    "cells.png": "What became of the cells, and what they took",
}
CELLS = ("cell", "", "state", "loss ± standard error", "parameters", "tokens", "FLOPs", "time", "expected")


class Section(NamedTuple):
    """A table of the report; one without rows is left out."""

    title: str
    rows: Sequence[tuple[str, ...]]
    head: tuple[str, ...] = ()
    """Names of the columns; without them each row is a name and its values"""


def write(folder: Folder, settings: Settings | None = None, out: Path | None = None) -> list[Path]:
    """Writes results.tsv, the pictures, fit.json where the runs can be fitted, report.html, and report.md, which a
    repository can keep.

    Args:
        settings: of the fit.
        out: where to; None: into the sweep's folder.

    Returns:
        The files, the report first.
    """
    results, states, out = folder.write_results(), folder.states(), folder.path if out is None else out
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    if out != folder.path:
        results = Path(shutil.copy(results, out))
    drawn = [cells_picture(pictures / "cells.png", folder, states)]
    analysis: Analysis | None = None
    why = ""
    try:
        settings = replace(settings or Settings(), coupled=folder.coupled)
        analysis = analyse(read_runs(results), settings)
    except UserError as error:
        why = str(error)
    written = [results]
    if analysis is not None:
        drawn += draw(pictures, analysis)
        file = out / "fit.json"
        write_text(file, json.dumps(analysis.json(), indent=1) + "\n")
        written.append(file)
    page, text = out / "report.html", out / "report.md"
    write_text(page, render(folder, states, analysis, why, drawn))
    write_text(text, markdown(folder, states, analysis, why, drawn))
    return [page, text, *written, *drawn]


def render(
    folder: Folder, states: dict[str, State], analysis: Analysis | None, why: str, pictures: Sequence[Path]
) -> str:
    """The page. `why`: the reason that there is no fit."""
    names = [state.name for state in states.values()]
    done = "complete" if set(names) <= {"complete", "dropped"} else "running" if "running" in names else "unfinished"
    found, cells = sections(folder, states, analysis, why)
    images = "".join(_image(file, text) for file, text in _pictures(pictures))
    body = [cards(_cards(folder, states)), *(table(*section) for section in found)]
    body += [f'<div class="charts">{images}</div>', *(table(*section) for section in cells)]
    about = f"the rows are in {RESULTS}, each run's own report in runs/CELL/report.html"
    return page(folder.name, about, "".join(body), "report", state=done)


def markdown(
    folder: Folder, states: dict[str, State], analysis: Analysis | None, why: str, pictures: Sequence[Path]
) -> str:
    """The page as Markdown, with the pictures beside it."""
    found, cells = sections(folder, states, analysis, why)
    lines = [f"# {folder.name}", "", *(f"- {a}: {b}{f' ({c})' if c else ''}" for a, b, c in _cards(folder, states))]
    for section in (*found, *cells):
        if any(any(row[1:]) for row in section.rows):
            columns = len(section.rows[0])
            lines += ["", f"## {section.title}", "", _line(section.head or [""] * columns), "|---" * columns + "|"]
            lines += [_line(row) for row in section.rows]
    for file, text in _pictures(pictures):
        lines += ["", f"![{text}]({file.parent.name}/{file.name})"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell.replace('|', ' ')} " for cell in cells) + "|"


def sections(
    folder: Folder, states: dict[str, State], analysis: Analysis | None, why: str
) -> tuple[list[Section], list[Section]]:
    """The tables that tell of the law, and those that tell of the cells."""
    prediction = predicting.compared(folder)
    return (
        [
            Section("Held-out run", list(_held_out(prediction)) if prediction else []),
            *(_fit(analysis) if analysis else (Section("The law", [("no fit", why)]),)),
        ],
        [
            Section("Failures", list(_failures(folder, states)), ("cell", "", "state", "reason")),
            Section("Cells", list(_cells(folder, states)), CELLS),
        ],
    )


def _pictures(files: Sequence[Path]) -> Iterable[tuple[Path, str]]:
    by_name = {file.name: file for file in files}
    return ((by_name[name], text) for name, text in PICTURES.items() if name in by_name)


def cells_picture(file: Path, folder: Folder, states: dict[str, State]) -> Path:
    """Draws the cells over parameters and tokens, by state; and the time they took against their FLOPs."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    marks = {"complete": "o", "running": "^", "waiting": ".", "diverged": "x", "failed": "X", "dropped": "v"}
    for name, mark in marks.items():
        cells = [cell for cell in folder.cells if states[cell.hash].name == name]
        if cells:
            left.scatter([c.params for c in cells], [c.tokens for c in cells], marker=mark, label=name)
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="tokens", title="What became of the cells")
    left.legend(fontsize=8)
    cells = [cell for cell in folder.cells if states[cell.hash].name == "complete"]
    flops = [cell.flops for cell in folder.cells]
    right.scatter(flops, [max(c.seconds, 1e-3) for c in folder.cells], marker=".", color="gray", label="expected")
    right.scatter([c.flops for c in cells], [max(states[c.hash].seconds, 1e-3) for c in cells], label="measured")
    right.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="seconds", title="Cost")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _cards(folder: Folder, states: dict[str, State]) -> list[tuple[str, str, str]]:
    cells = [cell for cell in folder.cells if states[cell.hash].name == "complete"]
    names = [state.name for state in states.values()]
    failed = names.count("failed") + names.count("diverged")
    spent = sum(state.seconds for state in states.values())
    found = [
        ("cells complete", f"{len(cells)} of {len(names)}", f"{failed} failed or diverged" if failed else ""),
        ("training", si(sum(cell.flops for cell in cells)) + "FLOP", "head and attention counted"),
        ("time", duration(spent), "of training, all cells"),
    ]
    if cells:
        best = min(cells, key=lambda cell: states[cell.hash].loss)
        found.insert(0, ("lowest loss", f"{states[best.hash].loss:.4f}", best.label))
    return found


def _held_out(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    run = found["run"]
    yield "run", f"{found['label']}, {found['flops']:.3g} FLOPs"
    yield "written", f"{found['time']}, from {found['fitted_runs']} runs, before it ran (predictions.json)"
    interval = f"{found['level']:.0%} interval of one run {run['low']:.4f} to {run['high']:.4f}"
    yield "predicted", f"{found['mean']['value']:.4f}; {interval}"
    if "actual" not in found:
        yield "actual", "not run yet"
        return
    yield "actual", f"{found['actual']:.4f}, {'inside' if found['inside'] else 'outside'} the interval"
    yield "error", f"{found['error']:+.2%}"
    if found["error_of_line"] is not None:
        yield "a line", f"without a floor is off by {found['error_of_line']:+.2%}"


def _fit(analysis: Analysis) -> Iterable[Section]:
    names = {"a": "a: best N ~ C^a"}
    yield Section("The law", [(names.get(name, name), str(e)) for name, e in analysis.estimates.items()])
    others = [(f"approach {key}", f if isinstance(f, str) else str(f.a)) for key, f in analysis.others.items()]
    if analysis.bias is not None:
        bias = analysis.bias
        there = f"{bias.a:+.4f} in a; at C={bias.flops:.2g}, {bias.params:+.1%} in N and {bias.tokens:+.1%} in D"
        others.append(("bias of 2", f"on these cells of a surface without noise: {there}"))
    yield Section("a, by approach", [("approach 3", str(analysis.estimates["a"])), *others])
    yield Section(
        "a, by what counts as FLOPs a token", [(CONVENTIONS[k], str(e)) for k, e in analysis.conventions.items()]
    )
    yield Section("Predictions of the largest budgets from the smaller ones", list(_roll_out(analysis)))
    notes = list(analysis.notes)
    if analysis.seeds.identified and not math.isnan(analysis.seeds.value):
        notes.append(f"seeds of one cell differ by {analysis.seeds.value:.2%} (standard deviation of ln loss)")
    yield Section("To know", [("", note) for note in notes])


def _roll_out(analysis: Analysis) -> Iterable[tuple[str, str]]:
    for left_out in (1, 2):
        try:
            (found,) = roll_out(analysis.draws, analysis.runs, (left_out,), count=len(analysis.draws.theta))
        except UserError:  # too few budgets
            return
        figures = found.json()
        yield (
            f"without {left_out}",
            f"fitted to {found.fitted_runs} runs, {len(found.actual)} predicted: off by "
            f"{figures['median_error']:.2%} (median), {figures['largest_error']:.2%} at most; {found.covered:.0%} "
            f"inside their {found.level:.0%} intervals; a line without a floor is off by "
            f"{figures['median_error_of_a_line_without_floor']:.2%} (median)",
        )


def _failures(folder: Folder, states: dict[str, State]) -> Iterable[tuple[str, ...]]:
    for cell in folder.cells:
        state = states[cell.hash]
        if state.name in ("failed", "diverged"):
            yield cell.hash, cell.label, state.name, state.reason


def _cells(folder: Folder, states: dict[str, State]) -> Iterable[tuple[str, ...]]:
    for cell in folder.cells:
        yield _row(cell, states[cell.hash])


def _row(cell: Planned, state: State) -> tuple[str, ...]:
    error = "" if math.isnan(state.loss_se) else f" ± {state.loss_se:.4f}"
    loss = "" if math.isnan(state.loss) else f"{state.loss:.4f}{error}"
    return (
        cell.hash, cell.label + (" (held out)" if cell.held_out else ""), state.name, loss, f"{cell.params:,}",
        f"{cell.tokens:,}", f"{cell.flops:.3g}", duration(state.seconds) if state.seconds else "",
        duration(cell.seconds),
    )  # fmt: skip


def _image(file: Path, text: str) -> str:
    content = file.read_bytes()
    data, (width, height) = base64.b64encode(content).decode(), struct.unpack(">II", content[16:24])  # PNG's header
    kind = "chart row" if width > 2 * height else "chart"
    return (
        f'<figure class="{kind}"><figcaption>{escape(text)}</figcaption>'
        f'<img alt="{escape(text)}" src="data:image/png;base64,{data}"></figure>'
    )
