"""`slmjax sweep plan|run|status|report`: many runs that are planned, run and judged together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from slmjax.cli import tables
from slmjax.cli.args import parse
from slmjax.cli.sweep_progress import propose, status
from slmjax.errors import UserError
from slmjax.files import at

if TYPE_CHECKING:
    from slmjax.sweeps.folder import Planned
    from slmjax.sweeps.planning import Plan

HELP = "plan many runs, run them, and fit a scaling law to them"
USAGE = """usage: slmjax sweep plan|run|cells|status|propose|report ...

  plan FILE --out DIR   the cells with their parameters, tokens, FLOPs, time and memory; writes DIR
  run DIR               runs the cells that are not complete; may be stopped, killed, and run in several processes
                        (on a cluster: slmjax launch slurm DIR)
  cells DIR HASH ...    trains these cells of one shape as one program, in this process (`run` does so by itself)
  status DIR            the state and loss of every cell, the time left, and what the fit predicts by now
  propose DIR           the cells that would make that prediction surer, the best first
  report DIR            DIR/report.html: the losses, the fit of a scaling law, failures, cost

FILE is Python with `def sweep() -> Sweep`, or a `sweep` that yields experiments. Example:
  slmjax sweep plan experiments/scaling/chinchilla_cpu.py --out runs/chinchilla
  slmjax sweep run runs/chinchilla --workers 2
  slmjax sweep report runs/chinchilla

`slmjax sweep plan --help`, and so on, lists the options of each."""


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    file: Annotated[str, tyro.conf.Positional]
    """A Python file, file.py:function or module:function"""
    out: str
    """The sweep's folder"""
    data_dir: str = "runs/data"
    """Where prepared data are, and are put"""
    memory_gb: float | None = None
    """Assume a device with so much memory"""
    wandb_sweep: str | None = None
    """Also write the configuration of a W&B sweep of these cells to this YAML file, for `wandb sweep` and its agents"""
    dry_run: bool = False
    """Print the table, and write no folder"""
    json: bool = False
    """Print JSON"""


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: Annotated[str, tyro.conf.Positional]
    """The sweep's folder"""
    workers: int = 1
    """Processes at a time; they share the processors and the memory"""
    population: int | None = None
    """Cells that differ only in seeds, learning rates and other numbers train together as one program, at most so many;
    default: up to 8, as many as fit into memory"""
    no_populations: Annotated[bool, tyro.conf.arg(name="no-populations"), tyro.conf.FlagCreatePairsOff] = False
    """Each cell trains alone"""

    until_interval: str | None = None
    """Begin no more cells, but for the held-out one, once the law's prediction of it is as sure as this: half of its
    interval as a share of the loss, such as 1.5%. It is fitted again whenever a cell is complete"""
    wait: bool = True
    """--no-wait: end once other processes run every cell that is left (on a cluster, whose scheduler restarts them)"""


@dataclass(frozen=True, kw_only=True)
class CellsArgs:
    dir: Annotated[str, tyro.conf.Positional]
    """The sweep's folder"""
    hashes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Cells, by their hashes; `cell=HASH`, as an agent of W&B writes it, will do"""


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    dir: Annotated[str, tyro.conf.Positional]
    """The sweep's folder"""
    draws: int = 300
    """Of the bootstrap"""
    level: float = 0.9
    """Of all intervals of the report; that of the held-out run was chosen when it was written"""
    out: str | None = None
    """Where to write, such as a folder of a repository; default: the sweep's folder"""


def main(argv: list[str]) -> int:
    verbs = {"plan": _plan, "run": _run, "cells": _cells, "status": status, "propose": propose, "report": _report}
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not argv or argv[0] not in verbs:
        given = f"{argv[0]!r} is none of them" if argv else "which?"
        raise UserError(f"slmjax sweep: {given}; expected {', '.join(verbs)}; `slmjax sweep --help` explains them")
    return verbs[argv[0]](argv[1:])


def _plan(argv: list[str]) -> int:
    args = parse(
        PlanArgs,
        argv,
        prog="slmjax sweep plan",
        description="Estimates what every cell of a sweep takes and writes the sweep's folder. Refuses cells that run "
        "out of memory; warns of data that repeats and of designs that cannot identify a scaling law.",
        example="slmjax sweep plan experiments/scaling/chinchilla_cpu.py --out runs/chinchilla --dry-run",
    )
    if args.memory_gb is not None and not args.memory_gb > 0:
        raise UserError(f"--memory-gb is {args.memory_gb}; expected a number of gigabytes above 0, such as 8")
    from slmjax.data.build_progress import show_progress
    from slmjax.runs.estimate_memory import device_memory
    from slmjax.sweeps import folder as folders
    from slmjax.sweeps import wandb_sweep
    from slmjax.sweeps.cells import load
    from slmjax.sweeps.planning import as_json, plan

    sweep, source = load(args.file)
    memory = args.memory_gb * 1e9 if args.memory_gb else device_memory()[0]
    with show_progress() as progress:
        made = plan(sweep, source, at(args.out), data_dir=args.data_dir, memory=memory, progress=progress)
    if not args.dry_run:
        folders.refuse_other(made.folder)
    print(as_json(made)) if args.json else _show_plan(made)
    if made.too_large:
        raise UserError(f"{len(made.too_large)} of {len(made.folder.cells)} cells do not fit: {made.too_large[0]}")
    if not args.dry_run:
        folders.save(made.folder, made.experiments)
        if args.wandb_sweep is not None:
            wandb_sweep.write(made.folder, at(args.wandb_sweep))
    if not args.json:
        print(f"next:\n  slmjax sweep run {args.out}" if not args.dry_run else "dry run: nothing is written")
    return 0


def _run(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parse(
        Run,
        argv[:cut],
        prog="slmjax sweep run",
        description="Runs every cell that is not complete, in processes of their own; cells of one shape train as one "
        "program. A cell that fails or diverges is recorded, and the others go on. Killed or stopped, run the same "
        "command again. Two of these commands on one folder share the work. What follows ` -- ` are --runtime... "
        "options of `slmjax train` for every cell. "
        "Exit codes: 0 all complete, 3 some diverged, 2 some failed, 75 stopped.",
        example="slmjax sweep run runs/chinchilla --workers 2 -- --runtime.tracking.wandb offline",
    )
    from slmjax.sweeps import folder as folders
    from slmjax.sweeps.running import run
    from slmjax.sweeps.watching import share

    if args.no_populations and args.population not in (None, 1):
        raise UserError(
            f"--population is {args.population}, but --no-populations trains each cell alone; leave one out"
        )
    folder = folders.read(at(args.dir))
    population = 1 if args.no_populations else args.population
    until = None if args.until_interval is None else share(args.until_interval)
    complete = run(
        folder, workers=args.workers, population=population, until=until, options=argv[cut + 1 :], wait=args.wait,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    if not complete:
        print("nothing is left for this process: others run the last cells")
        return 0
    print(f"all cells are complete: {folder.path / folders.RESULTS}\nnext:\n  slmjax sweep report {args.dir}")
    return 0


def _cells(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parse(
        CellsArgs,
        argv[:cut],
        prog="slmjax sweep cells",
        description="Trains cells that differ only in seeds, learning rates and other numbers as one program, each in "
        "its own run folder, from its newest checkpoint. One that diverges leaves the others as they are. What follows "
        "` -- ` are --runtime... options. `slmjax sweep run` calls this by itself, and records how the cells end.",
        example="slmjax sweep cells runs/chinchilla 0a1b2c3d4e5f6071 8a9b0c1d2e3f4051",
    )
    from slmjax.cli.experiment_args import parse as parse_experiment
    from slmjax.runs import populations
    from slmjax.runs.launch import train
    from slmjax.sweeps import folder as folders
    from slmjax.sweeps import trunks
    from slmjax.sweeps.running import train_words

    folder = folders.read(at(args.dir))
    by_hash = {cell.hash: cell for cell in folder.cells}
    hashes = [name.removeprefix("cell=") for name in args.hashes]
    if unknown := [name for name in hashes if name not in by_hash]:
        raise UserError(f"{args.dir} has no cell {unknown[0]}; `slmjax sweep status {args.dir}` lists them")
    folder.check()
    members = []
    for name in hashes:
        words = train_words(folder, by_hash[name], argv[cut + 1 :])
        members.append(parse_experiment(words, "slmjax sweep cells", "", args.dir))
        trunks.begin(folder, by_hash[name], *members[-1][:2])
    if len(members) == 1:
        return train(*members[0])
    populations.verdict(populations.train(members))
    return 0


def _report(argv: list[str]) -> int:
    args = parse(
        ReportArgs, argv, prog="slmjax sweep report",
        description="Writes results.tsv, and report.html and report.md with pictures: losses, the fit of a scaling law "
        "where the design allows one, the held-out prediction, failures and cost.",
        example="slmjax sweep report runs/chinchilla",
    )  # fmt: skip
    from slmjax.scaling.analysis import Settings
    from slmjax.sweeps import folder as folders
    from slmjax.sweeps.report import write

    settings = Settings(draws=args.draws, level=args.level)
    for file in write(folders.read(at(args.dir)), settings, None if args.out is None else at(args.out)):
        print(file)
    return 0


def _show_plan(plan: Plan) -> None:
    from rich.table import Table

    from slmjax.track.progress import duration, si

    cells = plan.folder.cells
    table = Table(title=f"{plan.folder.name}: {len(cells)} cells", title_justify="left")
    for name in ("cell", "", "parameters", "steps", "tokens", "FLOPs", "time", "memory"):
        table.add_column(name, justify="left" if name in ("cell", "") else "right", overflow="fold")
    for cell in cells:
        about = cell.label + (" (held out)" if cell.held_out else "")
        table.add_row(
            cell.hash, about, f"{cell.params:,}", f"{cell.steps:,}", f"{cell.tokens:,}", f"{cell.flops:.3g}",
            duration(cell.own * cell.seconds), f"{si(cell.memory)}B",
        )  # fmt: skip
    table.add_section()
    table.add_row("total", "", "", *_total(cells), duration(sum(c.own * c.seconds for c in cells)), "")
    tables.show(table)
    branches = [cell for cell in cells if cell.trunk]
    if branches:
        saved = sum(cell.flops * (1 - cell.own) for cell in branches) / sum(cell.flops for cell in cells)
        print(
            f"{len(branches)} cells go on from a checkpoint of a shorter one, whose steps the totals count once: "
            f"{saved:.0%} less than each from step 0"
        )
    shapes = Counter(cell.shape for cell in cells if cell.shape and not cell.held_out)
    if any(n > 1 for n in shapes.values()):
        many = sum(n for n in shapes.values() if n > 1)
        print(f"{many} cells are of {sum(n > 1 for n in shapes.values())} shapes that train as one program each")
    print("time: estimated from products of the models' shapes; compilation, evaluation and start-up come on top")
    for line in plan.too_large:
        print(f"does not fit: {line}")
    for line in plan.warnings:
        print(f"warning: {line}")


def _total(cells: tuple[Planned, ...]) -> list[str]:
    """Of what is trained: steps that cells share count once."""
    steps, tokens, flops = (sum(c.own * getattr(c, name) for c in cells) for name in ("steps", "tokens", "flops"))
    return [f"{steps:,.0f}", f"{tokens:,.0f}", f"{flops:.3g}"]
