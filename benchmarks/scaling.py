"""How the training step and its compilation grow with layers, width, sequence and vocabulary.

python benchmarks/scaling.py [--steps 5]

One dimension of workload B changes at a time. The exponent is the slope of log(seconds a step) over log(size).
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is timed

import slmjax_step as ours
import workload as w

from slmjax.runs.probe import compute_here

SIZES = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512),
    "length": (128, 256, 512, 1024),
    "vocab": (1024, 4096, 16384),
}


def measure(work: w.Workload, steps: int) -> tuple[float, float]:
    """(seconds to compile, seconds a step at best)."""
    run = ours.built(work, compute_here())
    state, data = run.init(), w.tokens(work, 1)[0]
    batch = run.put(ours.batch_of(data))
    start = time.perf_counter()
    step = run.step.lower(state, (), batch).compile()
    compiled, found = time.perf_counter() - start, []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, (), batch)
        float(metrics["loss"])
        found.append(time.perf_counter() - start)
    return compiled, min(found)


def main() -> None:
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    base = w.WORKLOADS["B"]
    print("| dimension | size | ms a step | compile, s |\n|---|---|---|---|")
    for name, sizes in SIZES.items():
        seconds = []
        for size in sizes:
            extra = {"hidden": size * 11 // 4, "heads": size // 64} if name == "width" else {}
            compiled, step = measure(replace(base, **{name: size}, **extra), args.steps)
            seconds.append(step)
            print(f"| {name} | {size} | {step * 1e3:.0f} | {compiled:.1f} |", flush=True)
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        print(f"| {name} | exponent | {slope:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
