"""Parses `EXPERIMENT [--field value ...]`, for the verbs that take an experiment."""

# Annotations stay objects (no `from __future__`): tyro reads those of the dataclasses made inside `parse`.

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from slmjax.errors import UserError


def parse(argv: list[str], prog: str, about: str, example: str) -> tuple[Any, Any, Path | None]:
    """`EXPERIMENT [--field value ...]` -> (Experiment, Runtime, the Python file that it came from).

    Raises:
        UserError: no experiment, an unknown field, a value of the wrong type.
    """
    import tyro

    from slmjax.cli.args import choose
    from slmjax.cli.args import parse as parse_args
    from slmjax.config import Experiment, Runtime
    from slmjax.data.recipe import Recipe
    from slmjax.data.stream import ReadProcesses, ReadThreads
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

    experiment = _shortened(experiment, rest)
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


def _shortened(experiment: Any, words: list[str]) -> Any:
    """The experiment cut to the `--steps` of the command line, as the default of every other field: what is given there
    still wins. What shrinks is said in one line."""
    from slmjax.runs.shortening import shortened

    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--steps"]
    given += [word.partition("=")[2] for word in words if word.startswith("--steps=")]
    if len(given) != 1 or not given[0].isdecimal():
        return experiment  # the parser says what is wrong
    cut = shortened(experiment, int(given[0]))
    flags = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}
    if said := [change for change in cut.changes if change.split()[0] not in flags]:
        before = experiment.steps
        print(f"{given[0]} steps instead of {before}, in proportion: {', '.join(said)}", file=sys.stderr, flush=True)
    return cut.experiment
