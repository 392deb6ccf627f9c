"""`slmjax train EXPERIMENT`: from an experiment and a runtime to a run folder."""

# Annotations stay objects (no `from __future__`): tyro reads those of the dataclasses made inside `parse`.

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from slmjax.errors import UserError

HELP = "train an experiment; resumes by itself"
PROG = "slmjax train"
EXAMPLE = "slmjax train experiments/pretrain/quickstart.py --schedule.peak-lr 2e-3 --runtime.workdir runs/lr2e-3"
ABOUT = """Trains an experiment. If the run folder holds a run of the same experiment it goes on where that stopped;
if it holds another, the differing fields are named and nothing is touched.

EXPERIMENT is a Python file with `def experiment() -> Experiment`, file.py:function, module:function, or a run's
config.json. Each of its fields can be overridden: `slmjax train EXPERIMENT --help` lists them.

Several processes train together with --runtime.distributed cluster (under SLURM, Open MPI, GKE, on TPU pods), or with
--runtime.distributed processes --runtime.distributed.coordinator 10.0.0.1:1234 --runtime.distributed.count 2
--runtime.distributed.index 0 (in the other process: 1); their fields are listed by
`slmjax train EXPERIMENT --runtime.distributed processes --help`. All need the same run folder and data folder."""


def main(argv: list[str]) -> int:
    experiment, runtime, source = parse(argv, PROG, ABOUT, EXAMPLE)
    from slmjax.runs.launch import train

    return train(experiment, runtime, source)


def parse(argv: list[str], prog: str, about: str, example: str) -> tuple[Any, Any, Path | None]:
    """`EXPERIMENT [--field value ...]` -> (Experiment, Runtime, the Python file that it came from).

    Raises:
        UserError: no experiment, an unknown field, a value of the wrong type.
    """
    import tyro

    from slmjax.cli.args import choose
    from slmjax.cli.args import parse as parse_args
    from slmjax.config import Experiment, Runtime
    from slmjax.data.loader import ReadProcesses, ReadThreads
    from slmjax.data.recipe import Recipe
    from slmjax.experiment_file import load_experiment
    from slmjax.train.processes import Cluster, Local, Processes

    if not argv or argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise UserError(f"{prog} needs an EXPERIMENT first; for example: {example}")

        @dataclass(frozen=True)
        class AnyExperiment:
            runtime: Runtime = field(default_factory=Runtime)

        parse_args(AnyExperiment, ["--help"], prog=f"{prog} EXPERIMENT", description=about, example=example)

    ref, *rest = argv
    experiment, source = load_experiment(ref)

    @dataclass(frozen=True)
    class Launch:
        experiment: Annotated[Experiment, tyro.conf.arg(name="")]
        runtime: Runtime

    kinds = {"local": Local, "cluster": Cluster, "processes": Processes}
    distributed, rest = choose("--runtime.distributed", kinds, rest)
    reader, rest = choose("--runtime.reader", {"threads": ReadThreads, "processes": ReadProcesses}, rest)
    default = Launch(experiment=experiment, runtime=Runtime(distributed=distributed, reader=reader))
    launch = parse_args(
        Launch,
        rest,
        prog=f"{prog} {ref}",
        description=about,
        example=example,
        default=default,
        as_text=(str | Recipe,),  # the source of a `Part`
    )
    return launch.experiment, launch.runtime, source
