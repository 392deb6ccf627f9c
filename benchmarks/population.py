"""What training several runs as one program costs: `python benchmarks/population.py`.

A population of 8 runs that differ in seed and learning rate, and the same 8 runs one after the other, in alternation:
the compiled step with its batches on the host, as the training loop calls it. The model is that of the smallest budget
of experiments/scaling/chinchilla_cpu.py. Times are processor seconds of this process, all its threads, and seconds of
the clock; the ratio is that of the processor seconds, which says more where other processes run.

Compilation is timed apart: the runs one by one compile 8 programs, in 8 processes as `slmjax sweep run` starts them.
The throughput of whole runs, of as many steps as that budget has, counts it: compilation + steps * the median step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

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
THROUGHPUT_BAR = 2.0
"""At least so many times the tokens a second of single runs, compilation included"""


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


class Seconds(NamedTuple):
    """Of the processor, all threads of this process, and of the clock."""

    processor: float
    clock: float


class Clock:
    """Runs from its creation."""

    def __init__(self):
        self.began = Seconds(time.process_time(), time.perf_counter())

    def passed(self) -> Seconds:
        return Seconds(time.process_time() - self.began.processor, time.perf_counter() - self.began.clock)


class Sides:
    """Both sides, each a function that trains all runs for some steps."""

    def __init__(self, several: list[Experiment], data: list[Batch]):
        compute = compute_here()
        base = several[0]
        objective = base.objective.build(base.model.build(compute, base.numerics))
        self.data = data
        started = Clock()
        self.population = Population(
            member_of(base, compute), values_of(several), frozen=objective.frozen,
            micro_tokens=compute.micro_tokens(base.model.width),
        )  # fmt: skip
        self.together(1)
        self.compiled_together = started.passed()
        started = Clock()
        self.programs = [build(each, Runtime(compute=compute)).program for each in several]
        self.states = [program.init() for program in self.programs]
        self.alone(1)
        self.compiled_alone = started.passed()

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


def timed(train: Callable[[int], None], steps: int) -> Seconds:
    """A step of all runs."""
    started = Clock()
    train(steps)
    passed = started.passed()
    return Seconds(passed.processor / steps, passed.clock / steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="timed in each round")
    parser.add_argument("--whole", type=int, default=740, help="steps of a whole run")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    several = experiments(args.runs, args.width, args.layers, args.length, args.batch)
    sides = Sides(several, batches(args.length, args.batch, 8))
    rounds = []
    for i in range(args.rounds):
        order = (sides.alone, sides.together) if i % 2 == 0 else (sides.together, sides.alone)
        rounds.append({train.__name__: timed(train, args.steps) for train in order})
    step = {name: Seconds(*(statistics.median(r[name][i] for r in rounds) for i in (0, 1))) for name in rounds[0]}
    ratio = statistics.median(r["together"].processor / r["alone"].processor for r in rounds)
    clocks = statistics.median(r["together"].clock / r["alone"].clock for r in rounds)
    size = parameter_count(several[0].model)
    tokens = f"{args.batch} x {args.length} tokens a step"
    print(f"{args.runs} runs of {size:,} parameters, {tokens}, {os.cpu_count()} cores; a step of all of them takes")
    for said, each in (("one by one", step["alone"]), ("together  ", step["together"])):
        print(f"{said}   {each.processor * 1e3:8.2f} ms of processor, {each.clock * 1e3:8.2f} ms of the clock")
    print(f"ratio        {ratio:8.2f}                  {clocks:8.2f}")
    whole = {
        "alone": sides.compiled_alone.clock + args.whole * step["alone"].clock,
        "together": sides.compiled_together.clock + args.whole * step["together"].clock,
    }
    more = whole["alone"] / whole["together"]
    first = f"{sides.compiled_alone.clock:.1f} s one by one, {sides.compiled_together.clock:.1f} s together"
    print(f"to the first step: {first}")
    both = f"{whole['alone']:.1f} s one by one, {whole['together']:.1f} s together"
    print(f"{args.whole} steps and that: {both}, {more:.2f} times the throughput")
    met = ratio <= BAR and more >= THROUGHPUT_BAR
    print(f"bars: at most {BAR:.1f}, at least {THROUGHPUT_BAR:.1f}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
