"""Pictures for pages: PNG, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Mark(NamedTuple):
    """A point with an interval, and what is written beside it."""

    name: str
    x: float
    y: float
    half_width: float = math.nan
    """Of the interval of y; nan: none"""
    group: str = ""
    """Marks of one group look alike, and the legend names it"""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    marks: Sequence[Mark]


def scatter(file: Path, panels: Sequence[Panel], *, y_label: str, most: float = math.inf) -> None:
    """Draws panels side by side, with one y axis.

    Args:
        most: what lies above is drawn at the upper edge, its value beside its name.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, columns = plt.subplots(
        1, len(panels), figsize=(7.5 * len(panels), 7), layout="constrained", sharey=True, squeeze=False
    )
    groups = dict.fromkeys(mark.group for panel in panels for mark in panel.marks)
    shapes = dict(zip(groups, ("o", "x", "s", "^", "v", "D", "*", "P") * len(groups), strict=False))
    for axes, panel in zip(columns[0], panels, strict=True):
        for group, shape in shapes.items():
            marks = [mark for mark in panel.marks if mark.group == group]
            if not marks:
                continue
            around = [0.0 if math.isnan(mark.half_width) or mark.y > most else mark.half_width for mark in marks]
            at = [mark.x for mark in marks], [min(mark.y, most) for mark in marks]
            axes.errorbar(*at, yerr=around, fmt=shape, capsize=3, markersize=5, linewidth=1, label=group)
        low, high = (f(min(mark.y, most) for panel in panels for mark in panel.marks) for f in (min, max))
        for mark, height in beside(panel.marks, most, (high - low) / 32):
            name = mark.name if mark.y <= most else f"{mark.name}: {mark.y:.2f}"
            axes.annotate(
                name, (mark.x, min(mark.y, most)), (18, height), textcoords=("offset points", "data"), fontsize=7,
                va="center", arrowprops={"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.6},
            )  # fmt: skip
        axes.set(title=panel.title, xlabel=panel.x_label)
        axes.grid(alpha=0.25)
        axes.margins(x=0.25, y=0.12)
    columns[0][0].set_ylabel(y_label)
    if any(groups):
        columns[0][-1].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def beside(marks: Sequence[Mark], most: float, step: float) -> list[tuple[Mark, float]]:
    """Each mark with the height of its name: its own or, where names of marks with nearly the same x would meet, above
    the one below, by `step`."""
    wide = (max(mark.x for mark in marks) - min(mark.x for mark in marks)) / 3 if marks else 0.0
    out: list[tuple[Mark, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.y):
        taken = [height for other, height in out if abs(other.x - mark.x) < wide]
        height = min(mark.y, most)
        for other in sorted(taken):
            if abs(other - height) < step:
                height = other + step
        out.append((mark, height))
    return out


class Curve(NamedTuple):
    """Points that a line connects."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Plot(NamedTuple):
    """One pair of axes with curves, x logarithmic."""

    title: str
    x_label: str
    curves: Sequence[Curve]


def curves(file: Path, plots: Sequence[Plot], *, y_label: str, log_y: bool = False) -> None:
    """Draws plots side by side, with one y axis. Values that are not finite are left out."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, columns = plt.subplots(
        1, len(plots), figsize=(5.5 * len(plots), 5), layout="constrained", sharey=True, squeeze=False
    )
    for axes, plot in zip(columns[0], plots, strict=True):
        for curve in plot.curves:
            there = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
            axes.plot(
                [x for x, _ in there], [y for _, y in there], marker="o", markersize=4, linewidth=1, label=curve.name
            )
        axes.set(title=plot.title, xlabel=plot.x_label, xscale="log", yscale="log" if log_y else "linear")
        marked = sorted({x for curve in plot.curves for x in curve.x})
        axes.set_xticks(marked, [f"{x:.3g}" for x in marked])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    columns[0][0].set_ylabel(y_label)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
