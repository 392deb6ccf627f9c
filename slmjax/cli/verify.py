"""`slmjax verify resume EXPERIMENT`: kill the experiment's training at hard moments, and compare with a run never
killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax.cli.args import parse
from slmjax.errors import StorageError, UserError
from slmjax.files import at
from slmjax.track.jsonl import read

HELP = "prove that an experiment resumes bit-exactly after being killed"
PROG = "slmjax verify resume"
EXAMPLE = "slmjax verify resume experiments/pretrain/quickstart.py --steps 20 -- --data.batch 4"
ABOUT = """Trains the experiment twice: once undisturbed, once killed (SIGKILL) in its first step, while it writes a
checkpoint, and at random moments, and started again each time. Every metric that does not measure time, the hash of
every batch, and every array of the last checkpoint must be bit-identical. What follows ` -- ` overrides fields of the
experiment, as in `slmjax train`."""
CLOCK = {"elapsed", "time", "step_seconds", "tokens_per_second", "mfu", "memory_bytes"}
"""The metrics that measure the machine, and may differ"""


@dataclass(frozen=True)
class Args:
    steps: int = 20
    """Steps to compare; a multiple of `every`. The experiment keeps its own schedule, and is stopped after them"""
    every: int = 5
    """Steps between checkpoints"""
    kills: int = 4
    """How often the second run is killed"""
    seed: int = 0
    """Seed of the random moments"""
    keep: str = ""
    """Keep both run folders here"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < self.every or self.steps % self.every:
            raise UserError(f"--steps is {self.steps}; expected a multiple of --every, {self.every}")


def main(argv: list[str]) -> int:
    from slmjax.cli import verify_mup

    if argv[:1] == ["mup"]:
        return verify_mup.main(argv[1:])
    if argv[:1] != ["resume"]:
        if argv and argv[0] in ("-h", "--help"):
            for prog, about, example in (
                (PROG, ABOUT, EXAMPLE),
                (verify_mup.PROG, verify_mup.ABOUT, verify_mup.EXAMPLE),
            ):
                print(
                    f"usage: {prog} EXPERIMENT [--flags] [-- --field value ...]\n\n{about}\n\nExample:\n  {example}\n"
                )
            return 0
        raise UserError(f"slmjax verify: expected `resume` or `mup`; for example: {EXAMPLE}")
    cut = argv.index("--") if "--" in argv else len(argv)
    own, overrides = argv[1:cut], argv[cut + 1 :]
    if not own or own[0].startswith("-"):
        parse(Args, own, prog=f"{PROG} EXPERIMENT", description=ABOUT, example=EXAMPLE)
        raise UserError(f"{PROG} needs an EXPERIMENT first; for example: {EXAMPLE}")
    args = parse(Args, own[1:], prog=PROG, description=ABOUT, example=EXAMPLE)
    return verify(own[0], args, overrides)


def verify(experiment: str, args: Args, overrides: Sequence[str]) -> int:
    """Runs both, compares them and prints what was compared.

    Raises:
        UserError: the training fails by itself.
        StorageError: the runs differ.
    """
    folder = at(args.keep or tempfile.mkdtemp(prefix="slmjax-verify-"))
    last = str(args.steps // args.every)
    common = ["--runtime.checkpoints.every", str(args.every), "--runtime.checkpoints.keep-last", last]
    common += ["--runtime.checkpoints.keep-every", str(args.steps)]  # it may train further before it is stopped
    common += ["--runtime.tracking.wandb", "disabled", "--runtime.log-every", "1", *overrides]
    runs = [Run(folder / name, [experiment, *common], args.steps) for name in ("undisturbed", "killed")]
    try:
        print(f"training {args.steps} steps undisturbed")
        runs[0].finish()
        moments = random.Random(args.seed)
        for kill, moment in zip(range(args.kills), _moments(moments), strict=False):
            print(f"kill {kill + 1} of {args.kills}: {runs[1].kill(moment, moments)}")
        runs[1].finish()
        problems, compared = compare(runs[0].folder, runs[1].folder, args.steps)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if problems:
        raise StorageError(f"the killed run differs: {'; '.join(problems[:3])} ({len(problems)} differences)")
    print(f"bit-identical: {compared}")
    return 0


def _moments(randomness: random.Random) -> Iterator[str]:
    yield "first step"
    yield "save"
    while True:
        yield randomness.choice(["random", "random", "save"])


@dataclass(frozen=True)
class Run:
    """One training run, which can be killed and started again."""

    folder: Path
    arguments: list[str]
    steps: int

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        command = [sys.executable, "-m", "slmjax.cli.main", "train", *self.arguments]
        command += ["--runtime.workdir", str(self.folder)]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def finish(self) -> None:
        """Trains to the end, or until the checkpoint of the last step to compare is saved, and stops the process."""
        process = self.start()
        self._wait(process, self._saved)
        process.terminate()
        process.wait()

    def kill(self, moment: str, randomness: random.Random) -> str:
        """Starts the training and kills it at a moment; returns a description of when."""
        process = self.start()
        before = self._rows()
        if moment == "first step":
            self._wait(process, (self.folder / "metrics.jsonl").exists)
            time.sleep(randomness.random())
        elif moment == "save":
            there = self._checkpoints()
            self._wait(process, lambda: any(name not in there for name in self._checkpoints()) or self._saved())
        else:
            more = randomness.randint(1, 4)
            self._wait(process, lambda: self._rows() >= before + more or self._saved())
            time.sleep(randomness.random() * 0.2)
        process.kill()
        process.wait()
        there = ", ".join(self._checkpoints()) or "none"
        return f"{moment}, after {self._rows()} rows of metrics, with checkpoints {there}"

    def _wait(self, process: subprocess.Popen[bytes], reached: Callable[[], Any]) -> None:
        while not reached():
            if process.poll() is not None:
                if process.returncode == 0 and self._saved():
                    return
                if process.returncode == 0:
                    raise UserError(f"--steps is {self.steps}, but the experiment ends before that; lower --steps")
                log = self.folder.parent / f"{self.folder.name}.log"
                tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                raise UserError(f"the training ended by itself with exit code {process.returncode}: {' '.join(tail)}")
            time.sleep(0.005)

    def _rows(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _checkpoints(self) -> list[str]:
        """Names in the checkpoint folder: steps, and saves in flight."""
        folder = self.folder / "checkpoints"
        names = (p.name for p in folder.iterdir()) if folder.is_dir() else ()
        return sorted(name for name in names if name[:1].isdigit())

    def _saved(self) -> bool:
        return (self.folder / "checkpoints" / str(self.steps)).is_dir()


def compare(one: Path, other: Path, steps: int) -> tuple[list[str], str]:
    """The differences between two runs up to a step, and what was compared."""
    first, second = (
        {row["step"]: {k: repr(v) for k, v in row.items() if k not in CLOCK} for row in read(run / "metrics.jsonl")}
        for run in (one, other)
    )
    problems = []
    for step in range(1, steps + 1):
        a, b = first.get(step), second.get(step)
        if a is None or b is None:
            problems.append(f"step {step} is missing")
        else:
            problems += [f"step {step}: {k} {a.get(k)} -> {b.get(k)}" for k in a | b if a.get(k) != b.get(k)]
    a, b = (_arrays(run / "checkpoints" / str(steps)) for run in (one, other))
    problems += [f"array {path}" for path in a | b if path not in a or path not in b or a[path] != b[path]]
    measured = len(first[steps]) if steps in first else 0
    return problems, f"{steps} steps of {measured} metrics with their batches, {len(a)} arrays of checkpoint {steps}"


def _arrays(checkpoint: Path) -> dict[str, bytes]:
    """Path -> dtype, shape and bytes, of everything a checkpoint holds."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    from slmjax.tree import flatten

    out = {}
    for item in ("params", "train"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            at = checkpoint.absolute() / item
            described = ocp.PyTreeCheckpointHandler().metadata(epath.Path(at)).tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
            leaves = flatten(reader.restore(at, args=ocp.args.PyTreeRestore(restore_args=dict(as_numpy))))
        out |= {f"{item}/{path}": f"{x.dtype}{x.shape}".encode() + x.tobytes() for path, x in leaves.items()}
    return out
