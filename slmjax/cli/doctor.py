"""`slmjax doctor EXPERIMENT`: will it fit, how long will it take, what will it cost. Compiles no step."""

from __future__ import annotations

import shlex
from typing import Any

from slmjax.cli import tables
from slmjax.errors import UserError
from slmjax.files import at

HELP = "will this experiment fit, how long will it take, what will it cost"
PROG = "slmjax doctor"
EXAMPLE = "slmjax doctor experiments/pretrain/quickstart.py --data.batch 64 --memory-gb 8"
ABOUT = """Judges an experiment before it is compiled: parameters, FLOPs, peak memory a device (from the trace of the
step), tokens/s (from 2 seconds of matrix products of its shapes), time and energy to finish, and a verdict. If the
memory is too small, one setting to change is named.

EXPERIMENT and its overrides are those of `slmjax train`; --memory-gb GB assumes a device with that much memory."""


def main(argv: list[str]) -> int:
    """0 if the experiment fits, 2 if not."""
    from slmjax.cli.experiment_args import parse

    memory_gb, rest = take_memory(argv)
    experiment, runtime, _ = parse(rest, PROG, ABOUT, EXAMPLE)

    from slmjax.runs import carriers, teaching
    from slmjax.runs.estimate_memory import device_memory, estimate, one_change
    from slmjax.runs.estimate_time import calibrate, watts
    from slmjax.runs.probe import verdict
    from slmjax.runs.same_compute import choice_of
    from slmjax.track.progress import si

    measured = verdict()
    choice = choice_of(runtime, at(runtime.workdir or f"runs/{experiment.name}"))
    compute, layout = choice.compute, runtime.layout
    mesh = dict(runtime.mesh.build().shape)
    limit, source = (memory_gb * 1e9, "--memory-gb") if memory_gb else device_memory()
    experiment = teaching.for_estimates(experiment, compute)
    memory = estimate(experiment, compute, mesh, layout)
    speed = calibrate(experiment.model, compute.dtype, experiment.data.batch * experiment.data.length)
    table = _table(experiment, compute, mesh, memory, limit, source, speed, watts())
    for name, value in zip(("processor", "  measured"), measured.lines() if measured else (), strict=False):
        table.add_row(name, value)
    table.add_row("computed in", f"{compute.dtype}, {choice.reason}")
    if fit := carriers.fits(experiment):
        for name, value in zip((f"{len(fit)} rounded parameters", ""), carriers.lines(fit), strict=True):
            table.add_row(name, value)
    tables.show(table)
    if memory.total <= limit:
        print(f"verdict: fits, with {1 - memory.total / limit:.0%} of the memory to spare")
        print(f"next:\n  slmjax train {shlex.join(rest)}")
        return 0
    change = one_change(experiment, compute, mesh, limit, layout)
    if change is None:
        print(
            f"verdict: does not fit ({si(memory.total)}B of {si(limit)}B), and no single setting is enough: "
            f"parameters, optimizer and gradients alone take {si(memory.total - memory.activations)}B; choose "
            "a smaller model, or a device with more memory"
        )
        return 2
    print(f"verdict: does not fit ({si(memory.total)}B of {si(limit)}B)")
    print(f"change one setting: {change.setting}  ({si(change.memory.total)}B; {change.cost})")
    return 2


def take_memory(argv: list[str]) -> tuple[float | None, list[str]]:
    """Splits `--memory-gb GB` off the arguments; the rest are those of `train`.

    Raises:
        UserError: its value is not a number above 0.
    """
    rest, gigabytes, words = [], None, iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--memory-gb", "--memory_gb"):
            rest.append(word)
            continue
        value = value or next(words, "")
        try:
            gigabytes = float(value)
        except ValueError:
            gigabytes = 0.0
        if not gigabytes > 0:
            raise UserError(f"--memory-gb is {value!r}; expected a number of gigabytes above 0, such as 8")
    return gigabytes, rest


def _resident() -> float:
    """Bytes of memory that this process takes before any step is computed."""
    import psutil

    return float(psutil.Process().memory_info().rss)


def _table(
    experiment: Any, compute: Any, mesh: dict[str, int], memory: Any, limit: float, source: str, speed: Any, power: Any
) -> Any:
    import jax
    from rich.table import Table

    from slmjax.models.flops import flops_per_token, nonembedding_count, parameter_count
    from slmjax.runs.estimate_memory import micro_batches
    from slmjax.track.progress import duration, si

    flops = flops_per_token(experiment.model, experiment.data.length, experiment.objective.predicted).attention
    flops += experiment.objective.more_flops(experiment.model, experiment.data.length)
    tokens = experiment.steps * experiment.data.batch * experiment.data.length
    rate = speed.tokens_per_second(flops)
    seconds = tokens / rate
    table = Table(title=experiment.name, show_header=False, title_justify="left")
    libraries = f"; Python and its libraries take another {si(_resident())}B" if jax.default_backend() == "cpu" else ""
    count, without_tables = parameter_count(experiment.model), nonembedding_count(experiment.model)
    pieces = micro_batches(experiment, compute, mesh)
    micro = f"in {pieces} micro-batches of " if pieces > 1 else ""
    rows = experiment.data.batch // pieces
    for name, value in (
        ("parameters", f"{count:,}, {without_tables:,} without tables"),
        ("training", f"{experiment.steps:,} steps, {micro}{rows} x {experiment.data.length}: {tokens:,} tokens"),
        ("FLOPs", f"{si(flops)}FLOP a token (attention and head counted), {si(flops * tokens)}FLOP in all"),
        ("device", f"{', '.join(f'{k}={v}' for k, v in mesh.items())}, {compute.dtype}, {si(limit)}B ({source})"),
        ("memory: parameters", f"{si(memory.params)}B"),
        ("  optimizer, view", f"{si(memory.optimizer)}B"),
        ("  gradients", f"{si(memory.gradients)}B"),
        ("  activations", f"{si(memory.activations)}B (remat: {type(compute.remat).__name__})"),
        ("  peak of a step", f"{si(memory.total)}B (estimate from the trace){libraries}"),
        ("matrix products", f"{si(speed.flops)}FLOP/s measured at these shapes"),
        ("expected", f"{rate:,.0f} tokens/s at {speed.efficiency:.0%} of that"),
        ("time to finish", f"about {duration(seconds)}, compilation and evaluation left out"),
        ("energy to finish", f"about {power[0] * seconds / 3.6e6:.3g} kWh (estimate: {power[1]})"),
    ):
        table.add_row(name, value)
    return table
