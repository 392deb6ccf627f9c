"""What training several runs as one program costs: `python benchmarks/population.py`.

A population of 4 runs that differ in seed and learning rate, and the same 4 runs one after the other, in alternation:
the compiled step with its batches on the host, as the training loop calls it. Times are processor seconds of this
process, all its threads, and seconds of the clock; the ratio is that of the processor seconds, which says more where
other processes run.

Compilation is timed apart: the runs one by one compile 4 programs, in 4 processes as `slmjax sweep run` starts them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is timed

import slmjax_step as ours  # before jax: it sets the flags

# isort: split
import jax
import numpy as np

from slmjax.config import Experiment, Runtime
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.optim.schedules import Cosine
from slmjax.runs.build import build
from slmjax.runs.populations import member_of, values_of
from slmjax.runs.probe import compute_here
from slmjax.train.advance import Steps
from slmjax.train.population import Population
from slmjax.types import Batch

BAR = 1.0
"""At most so many times the processor time of single runs"""


def experiments(runs: int, width: int, layers: int, length: int, batch: int) -> list[Experiment]:
    heads = max(1, width // 16)
    base = Experiment(
        name="population",
        model=llama(
            layers=layers, width=width, heads=heads, kv_heads=heads, hidden=8 * round(width / 3), vocab=264,
            context=length,
        ),
        data=PackedText(train=(Part(source="none"),), length=length, batch=batch),
        schedule=Cosine(peak_lr=1e-3),
        steps=1000,
    )  # fmt: skip
    return [replace(base, seed=i, schedule=Cosine(peak_lr=1e-3 * (1 + i))) for i in range(runs)]


def batches(length: int, rows: int, count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [ours.batch_of(rng.integers(0, 256, (rows, length + 1), dtype=np.int32)) for _ in range(count)]


class Sides:
    """Both sides, each a function that trains all runs for some steps."""

    def __init__(self, several: list[Experiment], data: list[Batch]):
        compute = compute_here()
        base = several[0]
        objective = base.objective.build(base.model.build(compute, base.numerics))
        self.data = data
        started = time.process_time()
        self.population = Population(
            member_of(base, compute), values_of(several), frozen=objective.frozen,
            micro_tokens=compute.micro_tokens(base.model.width),
        )  # fmt: skip
        self.together(1)
        self.compiled_together = time.process_time() - started
        started = time.process_time()
        self.programs = [build(each, Runtime(compute=compute)).program for each in several]
        self.states = [program.init() for program in self.programs]
        self.alone(1)
        self.compiled_alone = time.process_time() - started

    def together(self, steps: int) -> None:
        population, count = self.population, len(self.population.programs)

        def run(i: int) -> Steps:
            for step in range(steps):
                measured = yield self.data[step % len(self.data)]
                assert measured is not None
                measured.read()
            return population.held(i).get()

        assert population.train([run(i) for i in range(count)]) == [None] * count

    def alone(self, steps: int) -> None:
        for k, program in enumerate(self.programs):
            state = self.states[k]
            for i in range(steps):
                state, metrics = program.step(state, (), program.put(self.data[i % len(self.data)]))
                jax.device_get(metrics)
            self.states[k] = state


def timed(train: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Seconds of the processor and of the clock, a step of all runs."""
    clock, busy = time.perf_counter(), time.process_time()
    train(steps)
    return (time.process_time() - busy) / steps, (time.perf_counter() - clock) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    several = experiments(args.runs, args.width, args.layers, args.length, args.batch)
    sides = Sides(several, batches(args.length, args.batch, 8))
    found = []
    for i in range(args.rounds):
        order = (sides.alone, sides.together) if i % 2 == 0 else (sides.together, sides.alone)
        each = {train.__name__: timed(train, args.steps) for train in order}
        found.append((*each["alone"], *each["together"]))
    busy_alone, clock_alone, busy, clock = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(row[2] / row[0] for row in found)
    clocks = statistics.median(row[3] / row[1] for row in found)
    size = parameter_count(several[0].model)
    tokens = f"{args.batch} x {args.length} tokens a step"
    print(f"{args.runs} runs of {size:,} parameters, {tokens}, {os.cpu_count()} cores; a step of all of them takes")
    print(f"one by one   {busy_alone * 1e3:8.2f} ms of processor, {clock_alone * 1e3:8.2f} ms of the clock")
    print(f"together     {busy * 1e3:8.2f} ms of processor, {clock * 1e3:8.2f} ms of the clock")
    print(f"ratio        {ratio:8.2f}                  {clocks:8.2f}")
    compiled = f"{sides.compiled_alone:.1f} s of processor one by one, {sides.compiled_together:.1f} s together"
    print(f"to the first step: {compiled}")
    met = ratio <= BAR
    print(f"bar: at most {BAR:.1f}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
