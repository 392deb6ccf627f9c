"""Every number of bits with every method and granularity that has it: a stream of experiments, and their table.

    python experiments/quantize/matrix.py --list
    python experiments/quantize/matrix.py --seeds 1 --only "2 bits" --out docs/results/quantize

The model of `byte_model.py`. 60 combinations a seed, half a minute each on two idle cores. What no file format holds
exactly is left out. Writes matrix.md, matrix.tsv and matrix.png like `gaps.py`, which has the fewer rows and the
intervals; expect groups of 32 to lose a little less than channels, and to cost half a bit a weight more.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from byte_model import experiment, quantized
from gaps import Way, options, rows_of, stored, write

from slmjax.compress.quant.blocks import Granularity, PerChannel, PerGroup, PerTensor
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.config import Experiment

METHODS: Mapping[float, Mapping[str, Quantizer]] = {
    8: {"absmax": Symmetric(bits=8), "LSQ": LSQ(bits=8)},
    4: {
        "absmax": Symmetric(bits=4),
        "absmax, filled": Symmetric(bits=4, fill=True),
        "asymmetric": Asymmetric(bits=4),
        "LSQ": LSQ(bits=4),
        "SEQ": SEQ(levels=16),
    },
    3: {"absmax": Symmetric(bits=3), "asymmetric": Asymmetric(bits=3), "LSQ": LSQ(bits=3), "SEQ": SEQ(levels=8)},
    2: {
        "absmax": Symmetric(bits=2),
        "asymmetric": Asymmetric(bits=2),
        "LSQ": LSQ(bits=2),
        "SEQ": SEQ(),
        "balanced": Balanced(),
    },
    1.58: {"SEQ": SEQ(levels=3), "BitNet": BitNet()},
    1: {"learned": Binary(), "asymmetric": Asymmetric(bits=1)},
}
GRANULARITIES: Mapping[str, Granularity] = {
    "matrix": PerTensor(),
    "channel": PerChannel(),
    "groups of 32": PerGroup(size=32),
}


def ways(only: str = "") -> dict[str, Way]:
    """{name: way} of every combination that a file format holds, such as `2 bits, SEQ, channel`."""
    found = {}
    for bits, methods in METHODS.items():
        for method, quantizer in methods.items():
            for grain, granularity in GRANULARITIES.items():
                name = f"{bits:g} bits, {method}, {grain}"
                way = Way(bits, replace(quantizer, granularity=granularity))
                if only in name and stored(way.quantizer):
                    found[name] = way
    return found


def experiments(seeds: int = 1, only: str = "") -> Iterator[Experiment]:
    """Each combination with each seed, named."""
    for name, way in ways(only).items():
        for seed in range(seeds):
            yield replace(experiment(seed, quantized(way.quantizer, way.share)), name=f"{name}, seed {seed}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--list" in words:
        sys.stdout.writelines(f"{value.name}\n" for value in experiments())
        return 0
    args = options(__doc__, words)
    chosen = ways(args.only)
    rows = [row for seed in range(args.seeds) for row in rows_of(seed, args.work, chosen, args.steps)]
    command = f"python experiments/quantize/matrix.py --seeds {args.seeds}"
    write(args.out, "matrix", "Bits, methods and granularities", rows, chosen, command)
    sys.stdout.write((Path(args.out) / "matrix.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
