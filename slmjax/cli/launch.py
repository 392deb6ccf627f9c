"""`slmjax launch slurm|local`: a sweep or a training run where one process is not enough."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.launch.slurm import Resources

HELP = "run a sweep or an experiment on SLURM, or an experiment in several processes of this machine"
USAGE = """usage: slmjax launch slurm|local ...

  slurm SWEEP        an array job whose tasks share the cells of a sweep's folder
  slurm EXPERIMENT   one training run, of a process a node or a GPU
  local EXPERIMENT   one training run in several processes of this machine

Example:
  slmjax launch slurm runs/chinchilla --tasks 8 --time 4:00:00 --gpus 1 --dry-run
  slmjax launch slurm experiments/pretrain/quickstart.py --nodes 2 --time 12:00:00 -- --steps 20000
  slmjax launch local experiments/pretrain/quickstart.py --processes 2 -- --runtime.workdir runs/two

A sweep's cells also run several at a time on this machine: slmjax sweep run DIR --workers N.
`slmjax launch slurm --help`, and so on, lists the options of each."""
DEFAULT_TASKS = 8


@dataclass(frozen=True, kw_only=True)
class Slurm(Resources):
    target: Annotated[str, tyro.conf.Positional]
    """A sweep's folder, or an experiment as `slmjax train` takes it"""
    tasks: int | None = None
    """For a sweep: tasks of the array; by default one a cell that is not complete, 8 at most"""
    workers: int = 1
    """For a sweep: cells that a task runs at a time"""
    nodes: int = 1
    """For an experiment: nodes that train it together"""
    dry_run: bool = False
    """Print the script, and write and submit nothing"""


@dataclass(frozen=True, kw_only=True)
class Local:
    experiment: Annotated[str, tyro.conf.Positional]
    """As `slmjax train` takes it"""
    processes: int = 2
    """How many"""


def main(argv: list[str]) -> int:
    verbs = {"slurm": _slurm, "local": _local}
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not argv or argv[0] not in verbs:
        given = f"{argv[0]!r} is none of them" if argv else "where?"
        raise UserError(f"slmjax launch: {given}; expected {', '.join(verbs)}; `slmjax launch --help` explains them")
    return verbs[argv[0]](argv[1:])


def _slurm(argv: list[str]) -> int:
    given, words = _split(argv)
    args = parse(
        Slurm,
        given,
        prog="slmjax launch slurm",
        description="Writes a batch script that runs `slmjax sweep run` or `slmjax train`, and submits it. A job that "
        "is preempted, or comes near its time limit, saves and is requeued; scancel ends it, and launching it again "
        "goes on. What follows ` -- ` are --runtime... options of every cell, or any options of `slmjax train`.",
        example="slmjax launch slurm runs/chinchilla --tasks 8 --time 4:00:00 --gpus 1 --dry-run",
    )
    from slmjax.launch import slurm
    from slmjax.sweeps import folder as folders

    target = Path(args.target)
    if (target / folders.FILE).is_file():
        script, path, watch = _of_sweep(args, words)
    elif target.is_dir():
        raise UserError(f"{target} is a folder, but of no sweep (no {folders.FILE}); expected a sweep or an experiment")
    else:
        script, path, watch = _of_experiment(args, words)
    if args.dry_run:
        print(script, end="")
        return 0
    job = slurm.submit(script, path)
    print(f"submitted job {job}: {path}\nnext:\n  {watch}\n  squeue --job {job}\n  scancel {job}")
    return 0


def _of_sweep(args: Slurm, words: list[str]) -> tuple[str, Path, str]:
    """The script, where it is kept, and the command that tells how it goes."""
    from slmjax.launch import slurm
    from slmjax.sweeps import folder as folders
    from slmjax.sweeps.running import check_options

    if args.nodes != 1:
        raise UserError(
            f"--nodes is {args.nodes}, but {args.target} is a sweep, whose tasks take one node each: --tasks"
        )
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; expected at least 1")
    check_options(words)
    folder = folders.read(args.target)
    folder.check()
    left = sum(state.name not in folders.ENDED for state in folder.states().values())
    if not left:
        raise UserError(f"{args.target}: every cell has ended; next: slmjax sweep report {args.target}")
    tasks = min(left, DEFAULT_TASKS) if args.tasks is None else args.tasks
    script = slurm.array(folder.name, folder.path, tasks, args.workers, words, args)
    return script, slurm.script_of(folder.path), f"slmjax sweep status {args.target}"


def _of_experiment(args: Slurm, words: list[str]) -> tuple[str, Path, str]:
    """The same. The options are checked now, and not when the job starts."""
    from slmjax.launch import slurm

    if args.tasks is not None or args.workers != 1:
        raise UserError(f"--tasks and --workers are for sweeps; {args.target} is an experiment: --nodes")
    code, experiment, run = _experiment(args.target, words)
    script = slurm.training(experiment.name, run, args.nodes, ["train", args.target, *code, *words], args)
    return script, slurm.script_of(run, beside=True), f"slmjax report {run}"


def _local(argv: list[str]) -> int:
    given, words = _split(argv)
    args = parse(
        Local,
        given,
        prog="slmjax launch local",
        description="Trains an experiment in several processes of this machine's CPU, to try what several nodes will "
        "do (one process is enough for all GPUs of a machine). Ctrl-C and SIGTERM let the run save. If a process dies, "
        "the others end too, and the same command goes on. What follows ` -- ` are options of `slmjax train`.",
        example="slmjax launch local experiments/pretrain/quickstart.py --processes 2 -- --runtime.workdir runs/two",
    )
    from slmjax.launch import local

    code, _, run = _experiment(args.experiment, words)
    logs = run.with_name(f"{run.name}.local")
    local.train([args.experiment, *code, *words], args.processes, logs, lambda line: print(line, flush=True))
    if args.processes > 1:
        print(f"what the other processes printed: {logs}")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _experiment(ref: str, words: list[str]) -> tuple[list[str], Any, Path]:
    """`--code FILE` words that were given, the experiment and its run folder.

    Raises:
        UserError: the experiment or an option is wrong; or an option that this verb sets itself.
    """
    from slmjax.cli.experiment_args import parse as parse_experiment
    from slmjax.cli.main import take_code
    from slmjax.runs.launch import folder_of

    for word in words:
        if word.replace("_", "-").startswith("--runtime.distributed"):
            raise UserError(f"{word}: `slmjax launch` connects the processes itself; leave it out")
    experiment, runtime, _ = parse_experiment([ref, *words], "slmjax train", "", "slmjax train EXPERIMENT")
    code = [word for file in take_code(sys.argv[1:])[1] for word in ("--code", file)]
    return code, experiment, folder_of(experiment, runtime)
