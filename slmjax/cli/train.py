"""`slmjax train EXPERIMENT`: from an experiment and a runtime to a run folder."""

from slmjax.cli.experiment_args import parse

HELP = "train an experiment; resumes by itself"
PROG = "slmjax train"
EXAMPLE = "slmjax train experiments/pretrain/quickstart.py --schedule.peak-lr 2e-3 --runtime.workdir runs/lr2e-3"
ABOUT = """Trains an experiment. If the run folder holds a run of the same experiment, that run is resumed; if it
holds another, the fields that differ are named and nothing is changed.

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
