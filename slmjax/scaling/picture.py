"""Pictures of a fit, as PNG files, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slmjax.scaling.analysis import Analysis
from slmjax.scaling.approaches import Frontier
from slmjax.scaling.fit import predictions


def draw(folder: Path, analysis: Analysis) -> list[Path]:
    """Writes loss.png (against compute, with the law's best and its interval), residuals.png, profiles.png and, if
    there are budgets, isoflop.png (the parabolas of approach 2).

    Returns:
        The files.
    """
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_save(folder / "loss.png", _loss, analysis), _save(folder / "residuals.png", _residuals, analysis)]
    if analysis.profiles:
        drawn.append(_save(folder / "profiles.png", _profiles, analysis, len(analysis.profiles)))
    if isinstance(analysis.others["2"], Frontier):
        drawn.append(_save(folder / "isoflop.png", _isoflop, analysis))
    return drawn


def _save(file: Path, paint: Any, analysis: Analysis, panels: int = 1) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(max(7.5, 4.2 * panels), 5), layout="constrained", squeeze=False)
    try:
        paint(axes[0], analysis)
        for each in axes[0]:
            each.grid(alpha=0.25)
        figure.savefig(file, dpi=110)
    finally:
        plt.close(figure)
    return file


def _loss(axes: Any, analysis: Analysis) -> None:
    runs, fitted, (ax,) = analysis.runs, analysis.fitted, axes
    points = ax.scatter(runs["flops"], runs["loss"], c=np.log10(runs["params"]), s=14, zorder=3)
    ax.figure.colorbar(points, ax=ax, label="log10 params")
    flops = np.geomspace(runs["flops"].min(), runs["flops"].max() * 100, 80)
    split = fitted.allocation
    columns = {name: np.full(len(flops), float(runs[name].max())) for name in fitted.law.columns}
    columns |= {"params": split.params(flops, runs.cost), "tokens": split.tokens(flops, runs.cost)}
    if "unique_tokens" in columns:
        columns["unique_tokens"] = columns["tokens"]
    every = predictions(fitted.law, analysis.draws.theta, columns)
    tail = (1 - analysis.draws.level) / 2
    low, high = np.quantile(every, [tail, 1 - tail], axis=0)
    ax.fill_between(flops, low, high, alpha=0.2, color="tab:red", linewidth=0)
    ax.plot(flops, fitted.predict(columns), color="tab:red", label=f"best split, {analysis.draws.level:.0%} interval")
    ax.axvline(runs["flops"].max(), color="gray", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", xlabel="training FLOPs", ylabel="loss (nats a token)", title="Loss against compute")
    ax.legend()


def _residuals(axes: Any, analysis: Analysis) -> None:
    runs, (ax,) = analysis.runs, axes
    points = ax.scatter(runs["flops"], -100 * analysis.fitted.residuals, c=np.log10(runs["params"]), s=14)
    ax.figure.colorbar(points, ax=ax, label="log10 params")
    ax.axhline(0, color="gray", linewidth=0.8)
    ax.set(
        xscale="log", xlabel="training FLOPs", ylabel="loss above the fit (% of it)",
        title="What the law does not explain",
    )  # fmt: skip


def _profiles(axes: Any, analysis: Analysis) -> None:
    for ax, (name, profile) in zip(axes, analysis.profiles.items(), strict=True):
        ax.plot(profile.values, profile.objective, marker=".")
        ax.axhline(profile.threshold, color="tab:red", linewidth=0.8, label=f"{analysis.draws.level:.0%} interval")
        ax.axvline(analysis.fitted.values[name], color="gray", linewidth=0.8)
        # What lies far above the threshold would flatten the part that matters.
        bottom = float(profile.objective.min())
        room = max(profile.threshold - bottom, 1e-3 * abs(bottom), 1e-12)
        ax.set_ylim(bottom - 0.3 * room, bottom + 6 * room)
        near = profile.values[profile.objective <= bottom + 6 * room]
        if len(near) > 1:
            ax.set_xlim(near.min(), near.max())
        title = f"Profile of {name}" + ("" if profile.estimate.identified else ": not identified")
        ax.set(xlabel=name, title=title)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("criterion, minimised over the other parameters")


def _isoflop(axes: Any, analysis: Analysis) -> None:
    import matplotlib.pyplot as plt

    runs, frontier, (ax,) = analysis.runs, analysis.others["2"], axes
    assert isinstance(frontier, Frontier)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(frontier.minima)))
    for colour, minimum in zip(colours, frontier.minima, strict=True):
        sizes = runs["params"][minimum.runs]
        label = f"C={minimum.flops:.2g}" + (": rejected" if minimum.rejected else "")
        ax.scatter(sizes, runs["loss"][minimum.runs], color=colour, s=14, label=label)
        if not np.isnan(minimum.parabola[0]):
            x = np.geomspace(sizes.min(), sizes.max(), 60)
            style = ":" if minimum.rejected else "-"
            ax.plot(x, np.polyval(minimum.parabola, np.log(x / minimum.centre)), color=colour, linestyle=style)
        if not minimum.rejected:
            ax.scatter([minimum.params], [minimum.loss], color=colour, marker="x", s=50)
    a = frontier.a.value
    ax.set(xscale="log", xlabel="params", ylabel="loss (nats a token)", title=f"Approach 2: best N ~ C^{a:.3f}")
    ax.legend(fontsize=8)
