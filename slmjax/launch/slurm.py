"""Batch scripts for SLURM: plain bash that runs a command line of slmjax, and requeues its job when that was stopped.

A job that is preempted and exits with 0 in its grace time counts as completed, and one that is cancelled comes back if
its script requeues it. So the script requeues its job exactly if the command was stopped and SLURM still has the job as
running (job.sh.j2). What has become of a run stands in its own ledger, whatever SLURM says.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmjax.errors import UserError
from slmjax.files import write_text


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks SLURM for. What is None is left to the cluster's defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit after which SLURM ends the job, such as 4:00:00; it is told before, saves, and is requeued"""
    cpus: int | None = None
    """Processors of each process"""
    memory: str | None = None
    """Of each node, such as 32G"""
    gpus: int | None = None
    """Of each node; in a training job of several nodes also its processes there, one a GPU"""
    warn: int = 120
    """Seconds before the time limit at which the job is told to save"""
    setup: tuple[str, ...] = ()
    """Lines of bash that come first, such as 'module load cuda'"""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as --constraint=a100"""

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "warn"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; expected at least 1")
        for name in ("partition", "account", "qos", "time", "memory"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^\s\"'`$\\]+", value):
                raise UserError(f"--{name} is {value!r}; expected a word, as sbatch takes it")
        for option in self.sbatch:
            if not re.fullmatch(r"--?[^\n]+", option):
                raise UserError(f"--sbatch has {option!r}; expected an option of sbatch, such as --constraint=a100")


def array(name: str, folder: Path, tasks: int, workers: int, options: Sequence[str], resources: Resources) -> str:
    """The script of an array whose tasks share the cells of a sweep.

    Args:
        folder: of the sweep.
        workers: cells that a task runs at a time.
        options: `--runtime...` options of every cell.

    Raises:
        UserError: fewer than one task.
    """
    if tasks < 1:
        raise UserError(f"--tasks is {tasks}; expected at least 1")
    words = ["sweep", "run", str(folder), "--workers", str(workers), "--no-wait"]
    words += ["--no-populations"]  # else one task would take all cells of one shape, and leave none to the others
    plural = "s" if tasks > 1 else ""
    return _script(
        about=f"The sweep {name}: {tasks} task{plural}, each of which runs one cell after another.",
        path=script_of(folder),
        options=[
            f"--job-name={_name(name)}",
            f"--array=0-{tasks - 1}",
            "--nodes=1",
            "--ntasks=1",
            f"--output={_path(folder.absolute() / 'logs' / 'slurm-%A_%a.log')}",
        ],
        processes=1,
        words=[*words, "--", *options] if options else words,
        resources=resources,
    )


def training(name: str, run: Path, nodes: int, words: Sequence[str], resources: Resources) -> str:
    """The script of one training run, of a process a node, or a process a GPU.

    Args:
        run: its folder; script and log come to lie beside it.
        words: `train EXPERIMENT ...`.

    Raises:
        UserError: fewer than one node.
    """
    if nodes < 1:
        raise UserError(f"--nodes is {nodes}; expected at least 1")
    each = resources.gpus or 1
    many = nodes * each > 1
    return _script(
        about=f"{name}: one run on {nodes} node{'s' if nodes > 1 else ''}.",
        path=script_of(run, beside=True),
        options=[
            f"--job-name={_name(name)}",
            f"--nodes={nodes}",
            f"--ntasks-per-node={each}",
            f"--output={_path(script_of(run, beside=True).parent.absolute() / '%j.log')}",
        ],
        processes=nodes * each,
        words=[*words, *(["--runtime.distributed", "cluster"] if many else [])],
        resources=resources,
    )


def script_of(folder: Path, *, beside: bool = False) -> Path:
    """Where the script is kept: in a sweep's folder, beside that of a run, which training makes."""
    return (folder.with_name(f"{folder.name}.slurm") if beside else folder / "slurm") / "job.sh"


def submit(script: str, path: Path) -> str:
    """Writes the script and hands it to sbatch -> the number of the job.

    Raises:
        UserError: there is no sbatch, or it refuses.
        StorageError: the script cannot be written.
    """
    write_text(path, script)
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not installed here; where SLURM is, submit what was written: sbatch {path}")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(f"sbatch {path}: {said or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def _script(
    *, about: str, path: Path, options: list[str], processes: int, words: Sequence[str], resources: Resources
) -> str:
    import jinja2

    given = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "time": resources.time,
        "cpus-per-task": resources.cpus,
        "mem": resources.memory,
        "gpus-per-node": resources.gpus,  # not --gpus-per-task: each process must see them all, and takes its own
    }
    asked = [f"--{name}={value}" for name, value in given.items() if value is not None]
    always = ["--open-mode=append", "--requeue", f"--signal=B:USR1@{resources.warn}"]
    srun = [f"--ntasks={processes}", "--kill-on-bad-exit=1"]
    if resources.cpus is not None:
        srun.append(f"--cpus-per-task={resources.cpus}")  # srun does not take it from sbatch
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slmjax.launch", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("job.sh.j2").render(
        about=" ".join(about.split()),
        path=shlex.quote(str(path)),
        options=[*options, *asked, *always, *resources.sbatch],
        folder=shlex.quote(str(Path.cwd())),
        setup=resources.setup,
        srun=" ".join(srun),
        command=shlex.join([sys.executable, "-m", "slmjax.cli.main", *words]),
    )


def _name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name) or "slmjax"


def _path(path: Path) -> str:
    """For a line of sbatch."""
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text
