"""What the training loop costs around the jitted step: `python benchmarks/overhead.py`.

Configuration B (see workload.py) is trained twice in alternation, on the same batches and states: by calling the jitted
step alone, waiting for the device at the end only, and by `train.loop.train` with everything that a run has: batches
read through the loader protocol, hashed and put on the device, metrics fetched and written to a JSONL file, the guard,
signal handlers, the checkpointer. Saves and evaluations are left out: they are as rare as the user wants them.

The bar: at most 2% on top of the step. The loop's own host work a step is timed as well, around a step that takes no
time: it runs while the device computes, so it is the most that the loop can add.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import slmjax_step as ours  # before jax: it sets the flags
from workload import WORKLOADS, tokens

# isort: split
import jax

from slmjax.train import loop
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Skip
from slmjax.train.step import Program
from slmjax.types import Batch

BAR = 0.02


class Batches:
    """The same few batches over and over, by the loader's protocol."""

    def __init__(self, batches: list[Batch]):
        self.batches, self.next = batches, 0

    def __next__(self) -> Batch:
        self.next += 1
        return self.batches[(self.next - 1) % len(self.batches)]

    def state(self) -> dict[str, Any]:
        return {"next": self.next, "epoch": self.next / len(self.batches)}

    def restore(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Rows:
    """Rows of metrics in a file, flushed one by one as those of a run are."""

    def __init__(self, path: Path):
        self.file = path.open("w")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def artifact(self, path: Path, kind: str, metadata: dict[str, Any]) -> None: ...

    def resume(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None:
        self.file.close()


def built() -> tuple[Program, list[Batch]]:
    """Configuration B, and 8 batches of it."""
    b = WORKLOADS["B"]
    return ours.built(b), [ours.batch_of(rows) for rows in tokens(b, 8)]


def bare(run: Program, batches: list[Batch], steps: int) -> float:
    """Seconds a step of the jitted step alone, its batches on the device already."""
    state = run.init()
    on_device = [run.put(b) for b in batches]
    jax.block_until_ready((state, on_device))
    start = time.perf_counter()
    for i in range(steps):
        state, _ = run.step(state, (), on_device[i % len(on_device)])
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps


class Timed(Rows):
    """Notes when the first and the last row came, so that opening and the final save are not counted."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.times: list[float] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        super().log(step, metrics)
        self.times.append(time.perf_counter())


def whole(run: Program, batches: list[Batch], steps: int) -> float:
    """Seconds a step of the loop, between its first row and its last."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Timed(Path(folder) / "metrics.jsonl")
        loop.train(loop.Job(
            program=run, data=Batches(batches), steps=steps, workdir=Path(folder), tracker=rows, guard=Skip(),
            checkpoints=Checkpoints(every=0, seconds=0), say=lambda line: None,
        ))  # fmt: skip
    return (rows.times[-1] - rows.times[0]) / (len(rows.times) - 1)


class _Instant:
    """A program whose step takes no time: what is left is the loop."""

    @staticmethod
    def of(run: Program, batch: Batch) -> Program:
        state, metrics = run.step(run.init(), (), run.put(batch))
        jax.block_until_ready(metrics)
        return run._replace(step=lambda s, frozen, b: (state, metrics))


def host_work(run: Program, batches: list[Batch], steps: int) -> float:
    """Seconds of host work a step: the loop around a step that is done at once."""
    return whole(_Instant.of(run, batches[0]), batches, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps of each side in each round")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    run, batches = built()
    bare(run, batches, 2)
    pairs = []
    for i in range(args.rounds):
        sides = [("bare", bare), ("loop", whole)]
        timed = {name: side(run, batches, args.steps) for name, side in (sides if i % 2 == 0 else sides[::-1])}
        pairs.append((timed["bare"], timed["loop"]))
        print(
            f"round {i + 1}: step alone {timed['bare'] * 1e3:.1f} ms, loop {timed['loop'] * 1e3:.1f} ms a step",
            flush=True,
        )
    step, looped = (statistics.median(side) for side in zip(*pairs, strict=True))
    overhead = statistics.median(b / a - 1 for a, b in pairs)
    noise = statistics.median(abs(a / step - 1) for a, _ in pairs)
    host = host_work(run, batches, 500)
    met = host / step <= BAR and overhead - noise <= BAR
    print(f"step alone       {step * 1e3:8.2f} ms  (varies by {noise:.2%} between rounds)")
    print(f"whole loop       {looped * 1e3:8.2f} ms  ({overhead:+.2%}, median of {args.rounds} rounds)")
    print(f"host work a step {host * 1e3:8.2f} ms  ({host / step:.2%} of a step: the most that the loop can add)")
    print(f"bar: at most {BAR:.0%} on top of the step, noise aside: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
