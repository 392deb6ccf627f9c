"""What distillation costs: `python benchmarks/distill.py [--rounds 5] [--memory-only]`.

Memory: the arrays and the working memory of the compiled step (XLA's own account) with a vocabulary of 49,152 at 8 x
512 tokens, against plain training plus the teacher's weights; bar 1.3. Time: a step of distillation against a plain
step plus the teacher's forward pass with its loss, measured apart, in turns in one process (median over rounds of the
ratio of elapsed times); bar 1.15.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import slmjax_step as ours  # before jax: it sets the flags
import workload as w

# isort: split
import jax

from slmjax.distill.objective import Distill
from slmjax.distill.teacher import Teacher
from slmjax.objectives import NextToken
from slmjax.runs.probe import compute_here
from slmjax.train import micro

STUDENT = w.Workload(width=256, layers=4, heads=4, hidden=704, vocab=49152, length=512, batch=8)
TEACHER = dataclasses.replace(STUDENT, width=512, layers=8, heads=8, hidden=1408)
MEMORY_BAR, TIME_BAR = 1.3, 1.15


def bytes_of(compiled) -> int:
    """Arguments and working memory of a program; what is donated counts once."""
    found = compiled.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + kept


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true")
    args = parser.parse_args()
    compute = compute_here()
    assembly = ours.decoder(TEACHER)
    model = assembly.build(compute)
    params = jax.jit(model.init)(jax.random.key(1))
    teacher = Teacher(source="teacher", assembly=assembly, model=model, params=params)
    spec = Distill(teachers=("teacher",)).with_models((teacher,), tokens=STUDENT.vocab)

    plain, taught = ours.built(STUDENT, compute), ours.built(STUDENT, compute, objective=spec)
    frozen = {"0": params}
    batches = [ours.batch_of(rows) for rows in w.tokens(STUDENT, args.rounds + 1)]
    first = jax.device_put(batches[0])
    sizes = [
        bytes_of(run.step.lower(run.abstract, given, first).compile()) for run, given in ((plain, ()), (taught, frozen))
    ]
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    ratio = sizes[1] / (sizes[0] + weights)
    print(
        f"memory: distilling {sizes[1] / 2**20:.0f} MiB, plain {sizes[0] / 2**20:.0f} + teacher {weights / 2**20:.0f} "
        f"MiB: {ratio:.2f} times, at most {MEMORY_BAR}"
    )
    if args.memory_only:
        return

    objective = NextToken().build(model)
    pieces = micro.count(*first.tokens.shape, ways=1, least=1, tokens=compute.micro_tokens(STUDENT.width))

    @jax.jit
    def forward(params, batch):
        def loss(params, batch, key):
            return objective.loss(params, (), batch, key)[1], ()

        return micro.accumulated(loss, params, batch, jax.random.key(0), pieces)[0]["loss"]

    states = [plain.init(), taught.init()]
    seconds: list[list[float]] = [[], [], []]
    for number, batch in enumerate(batches):
        for i, (run, given) in enumerate(((plain, ()), (taught, frozen))):
            start = time.perf_counter()
            states[i], metrics = run.step(states[i], given, run.put(batch))
            float(metrics["loss"])
            seconds[i].append(time.perf_counter() - start)
        start = time.perf_counter()
        float(forward(params, jax.device_put(batch)))
        seconds[2].append(time.perf_counter() - start)
        if not number:  # the first one compiles
            seconds = [[], [], []]
    ratios = [taught / (plain + forward) for plain, taught, forward in zip(*seconds, strict=True)]
    plain_s, taught_s, forward_s = (statistics.median(each) for each in seconds)
    print(
        f"time: distilling {taught_s:.2f} s, plain {plain_s:.2f} + teacher forward {forward_s:.2f} s: "
        f"{statistics.median(ratios):.2f} times, at most {TIME_BAR}"
    )


if __name__ == "__main__":
    main()
