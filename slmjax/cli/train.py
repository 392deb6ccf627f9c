"""`slmjax train EXPERIMENT`: from an experiment and a runtime to a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slmjax.cli.experiment_args import parse
from slmjax.errors import UserError
from slmjax.files import at

HELP = "train an experiment; resumes by itself"
PROG = "slmjax train"
EXAMPLE = "slmjax train experiments/pretrain/quickstart.py --schedule.peak-lr 2e-3 --runtime.workdir runs/lr2e-3\n"
EXAMPLE += "  slmjax train runs/quickstart --extend 1000"
ABOUT = """Trains an experiment. If the run folder holds a run of the same experiment, that run is resumed; if it
holds another, the fields that differ are named and nothing is changed.

EXPERIMENT is a Python file with `def experiment() -> Experiment`, file.py:function, module:function, or a run's
config.json. Each of its fields can be overridden: `slmjax train EXPERIMENT --help` lists them.

--extend N takes a run folder, or its config.json, in place of EXPERIMENT and makes a run of N more steps, in a folder
of its own (default: that of the run, with the number of steps after it), from the newest checkpoint that the longer
run would have made as well. With a WSD schedule that is the one before the decay, which every run keeps.

Several processes train together with --runtime.distributed cluster (under SLURM, Open MPI, GKE, on TPU pods), or with
--runtime.distributed processes --runtime.distributed.coordinator 10.0.0.1:1234 --runtime.distributed.count 2
--runtime.distributed.index 0 (in the other process: 1); their fields are listed by
`slmjax train EXPERIMENT --runtime.distributed processes --help`. All need the same run folder and data folder.
`slmjax launch` starts them, on SLURM or on this machine."""


def main(argv: list[str]) -> int:
    parent, argv = _extended(argv)
    experiment, runtime, source = parse(argv, PROG, ABOUT, EXAMPLE)
    from slmjax.runs.launch import train

    if parent is not None:
        from slmjax.runs.extending import extend

        runtime = _of_parent(runtime, parent, experiment.steps)
        step = extend(parent, experiment, runtime)
        print(f"{runtime.workdir}: goes on from step {step} of {parent}, to {experiment.steps}", flush=True)
    return train(experiment, runtime, source)


def _extended(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Takes `--extend N` off the command line: the run that is continued, or None, and the words with its `--steps`.

    Raises:
        UserError: N is no number of steps, or no run is named.
    """
    words = [*argv]
    flags = [i for i, word in enumerate(words) if word.partition("=")[0] == "--extend"]
    if not flags:
        return None, words
    i = flags[-1]
    value = words.pop(i).partition("=")[2] or (words.pop(i) if i < len(words) and not words[i].startswith("-") else "")
    if not value.isdecimal() or not int(value):
        raise UserError(f"--extend is {value!r}; expected how many steps more, such as 1000")
    if any(word.partition("=")[0] == "--steps" for word in words):
        raise UserError("--extend and --steps both say how many steps there are; give one of them")
    place = at(words[0]) if words and not words[0].startswith("-") else None
    folder = place.parent if place is not None and place.name == "config.json" else place
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(f"--extend needs a run folder first, such as: {PROG} runs/quickstart --extend {value}")
    from slmjax.runs.extending import longer

    return folder, [words[0], "--steps", str(longer(folder, int(value)).steps), *words[1:]]


def _of_parent(runtime: Any, parent: Path, steps: int) -> Any:
    """The runtime of a run that extends another: a folder of its own, and the other's data folder unless it has one."""
    from slmjax.config import Runtime
    from slmjax.experiment_file import load_config
    from slmjax.serialise import from_json

    before = from_json(load_config(parent / "config.json")["runtime"])
    data = before.data_dir if runtime.data_dir == Runtime().data_dir else runtime.data_dir
    return replace(runtime, workdir=runtime.workdir or f"{parent}-{steps}", data_dir=data)
