"""`slmjax inspect MODEL`: the parameters of a model, and the training FLOPs of a token."""

from __future__ import annotations

import difflib
import math
import shlex
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from slmjax.cli import tables
from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

HELP = "parameters and FLOPs of a model or an experiment"

WIDE = 110
"""Columns of a terminal that is wide enough for every column of the table"""


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder, a GGUF file, an experiment that has not been trained, or a
    published size such as llama/smollm2-135m"""
    length: int | None = None
    """Tokens a sequence, for the FLOPs of attention; default: as in training, or the model's context"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax inspect",
        description="Every parameter with shape, dtype, logical axes and initial values; training FLOPs a token.",
        example="slmjax inspect experiments/pretrain/quickstart.py\n  slmjax inspect llama/smollm2-135m",
    )

    from slmjax.models.families import SIZES
    from slmjax.models.flops import active_count, flops_per_token, parameter_count

    decoder, length, params, predicted = _model(args)
    console = tables.console()
    tables.show(_parameters(decoder, params, console.width), console)
    tables.show(_flops(flops_per_token(decoder, length, predicted), length, predicted), console)
    total = parameter_count(decoder)
    print(f"{total:,} parameters, {total * 4:,} bytes in float32, {total * 2:,} in bfloat16")
    if (active := active_count(decoder)) < total:
        print(f"{active:,} of them are used for each token")
    if args.model in SIZES:
        size = SIZES[args.model]
        print(f"next: in an experiment\n  from {size.__module__} import {size.__name__}")
    else:
        command = "doctor {}" if params is None else decoder.example
        print(f"next:\n  slmjax {command.format(shlex.quote(args.model))}")
    return 0


def _model(args: Args) -> tuple[Any, int, Any, float]:
    """(decoder, sequence length, parameters or None, share of tokens with logits). An experiment needs no run."""
    from slmjax.experiment_file import load_experiment
    from slmjax.models.families import SIZES

    path = at(args.model)
    if args.model in SIZES and not path.exists():
        decoder = SIZES[args.model]()
        return decoder, args.length or decoder.context, None, 1.0
    if path.suffix != ".gguf" and (not path.exists() or path.is_file()):
        near = difflib.get_close_matches(args.model, SIZES, n=1)
        if near and not path.suffix:
            raise UserError(f"{args.model}: no such folder, experiment or published size; did you mean {near[0]}?")
        experiment, _ = load_experiment(args.model)
        return experiment.model, args.length or experiment.data.length, None, experiment.objective.predicted
    from slmjax.runs.loading import load

    loaded = load(path, step=args.step)
    run = loaded.experiment
    length = args.length or (run.data.length if run else loaded.decoder.context)
    return loaded.decoder, length, loaded.params, run.objective.predicted if run else 1.0


def _parameters(decoder: Any, params: Any, width: int) -> Any:
    from rich.table import Table

    from slmjax import tree
    from slmjax.nn.layer import Declared

    columns = ["path", "shape", "dtype", "logical axes", "count"]
    if width >= WIDE:
        columns[4:4] = ["initial"]
        columns += ["std"] * (params is not None)
    title = "parameters" if width >= WIDE else f"parameters ({WIDE} columns show initial values, too)"
    table = Table(title=title, title_justify="left")
    for column in columns:
        breaks = column in ("shape", "logical axes")  # may wrap on a narrow terminal
        justify = "right" if column in ("count", "std") else "left"
        table.add_column(column, justify=justify, no_wrap=not breaks, overflow="fold")
    values = {} if params is None else tree.flatten(params)
    declared = tree.flatten(decoder.declared(), is_leaf=lambda x: isinstance(x, Declared))
    for path, leaf in declared.items():
        shape = leaf.value.shape
        cells = {
            "path": path,
            "shape": " x ".join(map(str, shape)),
            "dtype": str(leaf.value.dtype),
            "logical axes": ", ".join(str(name) for name in leaf.names),
            "initial": leaf.initial,
            "count": f"{math.prod(shape):,}",
            "std": f"{float(values[path].std()):.4g}" if path in values else "",
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def _flops(flops: Any, length: int, predicted: float) -> Any:
    from rich.table import Table

    share = "all" if predicted == 1 else f"{predicted:.4g} of all"
    title = f"training FLOPs a token, sequences of {length}, the head at {share} tokens"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("convention")
    table.add_column("FLOPs a token", justify="right")
    for name, value in (
        ("(i) 6 N without tables", flops.nonembedding),
        ("(ii) (i) and the head", flops.head),
        ("(iii) (ii) and attention", flops.attention),
        ("(iv) 6 N", flops.total),
    ):
        table.add_row(name, f"{value:,}")
    return table
