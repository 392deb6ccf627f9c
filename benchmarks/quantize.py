"""What a step of quantization-aware training costs: `python benchmarks/quantize.py [--workloads A B] [--rounds 8]`.

The step of slmjax with full-precision weights and with each quantizer takes turns in one process, on the same batches.
The bar: at most 1.3 times the full-precision step (median over rounds of the ratio of elapsed times).
"""

from __future__ import annotations

import argparse
import statistics
import time

import slmjax_step as ours  # before jax: it sets the flags
import workload as w

from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.train.step import Program
from slmjax.views import EMA, Identity, View

BAR = 1.3


def of(quantizer) -> View:
    return Quantize(rules=(Rule(quantizer=quantizer),))


VIEWS: dict[str, View] = {
    "full precision": Identity(),
    "int4, absmax": of(Symmetric(bits=4)),
    "int4, LSQ": of(LSQ(bits=4)),
    "int4, LSQ, groups of 64": of(LSQ(bits=4, granularity=PerGroup(size=64))),
    "2 bits, SEQ": of(SEQ()),
    "2 bits, balanced": of(Balanced()),
    "2 bits, SEQ, averaged": EMA(of=of(SEQ())),
    "ternary, BitNet": of(BitNet()),
    "binary": of(Binary()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=sorted(w.WORKLOADS), default=["B"])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    for name in args.workloads:
        work = w.WORKLOADS[name]
        runs: dict[str, tuple[Program, list]] = {}
        for label, view in VIEWS.items():
            run = ours.built(work, view=view)
            runs[label] = run, [run.init()]
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        batches = [ours.batch_of(rows) for rows in w.tokens(work, args.rounds + 1)]
        for number, batch in enumerate(batches):
            for label, (run, held) in runs.items():
                start = time.perf_counter()
                held[0], metrics = run.step(held[0], (), run.put(batch))
                float(metrics["loss"])
                if number:  # the first one compiles
                    seconds[label].append(time.perf_counter() - start)
        print(f"\nWorkload {name}, {args.rounds} rounds; ratio to full precision, at most {BAR}")
        for label, each in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(each, seconds["full precision"], strict=True))
            print(f"{label:26}{statistics.median(each) * 1e3:9.0f} ms{ratio:8.2f}")


if __name__ == "__main__":
    main()
