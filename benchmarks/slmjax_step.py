"""slmjax's side of the step benchmark: the step of `slmjax train`, with batches as in its loop.

python benchmarks/slmjax_step.py --workload B [--init DIR]

Reads requests from stdin (see `workload.serve`); `benchmarks/step.py` drives it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import workload as w

from slmjax import platform

platform.tune_malloc()
platform.configure()

import numpy as np  # noqa: E402

from slmjax.convert.hf import write_hf  # noqa: E402
from slmjax.models.families.llama import llama  # noqa: E402
from slmjax.nn.compute import Compute  # noqa: E402
from slmjax.objectives import NextToken, ObjectiveSpec  # noqa: E402
from slmjax.optim.recipes import AdamW  # noqa: E402
from slmjax.optim.schedules import Constant  # noqa: E402
from slmjax.runs.probe import compute_here  # noqa: E402
from slmjax.train import stored  # noqa: E402
from slmjax.train.sharding import Mesh  # noqa: E402
from slmjax.train.step import Program, program  # noqa: E402
from slmjax.types import Batch  # noqa: E402
from slmjax.views import Identity, View  # noqa: E402


def decoder(work: w.Workload):
    """The workload's model."""
    return llama(
        layers=work.layers,
        width=work.width,
        heads=work.heads,
        kv_heads=work.heads,
        hidden=work.hidden,
        vocab=work.vocab,
        context=work.length,
        tied=True,
    )


def built(
    work: w.Workload,
    compute: Compute | None = None,
    view: View = Identity(),  # noqa: B008
    objective: ObjectiveSpec = NextToken(),  # noqa: B008
) -> Program:
    """The workload's training step, as `compute` says (default: what slmjax chooses here)."""
    compute = compute or compute_here()
    model = decoder(work).build(compute)
    param_view = view.build(model.axes)
    schedule = Constant(peak_lr=w.PEAK_LR).build(10**6)
    optimizer = AdamW(weight_decay=w.WEIGHT_DECAY, b1=w.BETAS[0], b2=w.BETAS[1], eps=w.EPS, clip_norm=w.CLIP_NORM)
    return program(
        model.init,
        model.axes,
        objective.build(model),
        optimizer.build(schedule, *stored.optimized(model.axes, param_view)),
        param_view,
        mesh=Mesh().build(),
        micro_tokens=compute.micro_tokens(work.width),
        schedule=schedule,
    )


def batch_of(rows: np.ndarray) -> Batch:
    """[B, T + 1] tokens -> a batch of whole documents."""
    tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy()
    arrays: list[Any] = [tokens, targets, np.ones(tokens.shape, np.float32), positions, np.ones_like(tokens)]
    return Batch(*arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(w.WORKLOADS), default="B")
    parser.add_argument("--init", type=pathlib.Path, help="write the initial parameters here, as a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=64, help="distinct batches")
    args = parser.parse_args()
    work = w.WORKLOADS[args.workload]
    compute = compute_here()
    print(f"slmjax computes in {compute.dtype}", file=sys.stderr)
    run = built(work, compute)
    state = run.init()
    if args.init:
        args.init.mkdir(parents=True, exist_ok=True)
        write_hf(args.init, decoder(work), state.params)

    def step(rows: np.ndarray) -> float:
        nonlocal state
        state, metrics = run.step(state, (), run.put(batch_of(rows)))
        return float(metrics["loss"])

    w.serve(step, w.tokens(work, args.steps))


if __name__ == "__main__":
    main()
