"""Do averaged weights and weight decay help training with quantized weights, and does that depend on the quantizer?

    python experiments/quantize/ablation.py --seeds 3 --out docs/results/quantize

The model of `byte_model.py`, each quantizer with weight decay 0.1 (the default of AdamW) and without, in the phase of
full precision too. A run's loss is measured twice, with its last weights and with an average of them (decay 0.98, a
window of 50 steps), so averaging is compared within a run. Differences are of pairs with the same seed; an interval
that contains 0 is no evidence. Runs that `gaps.py` has made in the same --work are not repeated. 27 minutes on one core
with AVX-512 and AMX, beside another program. Writes ablation.md and ablation.tsv.

Expected, by contest reports on ternary models of 16 MB: averaging costs much, weight decay stalls (claims, not papers);
Apple (arXiv:2507.13575) averages the weights of its balanced 2 bits and trains them without weight decay. Found
(docs/results/quantize/ablation.md): averaging helps none; without weight decay, balanced 2 bits lose 0.003 less and
2-bit absmax 0.010 more; the other quantizers do not tell.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from byte_model import DECAY, FULL, STEPS, WEIGHT_DECAY, Losses, losses, quantized, run
from gaps import folder_name, options

from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import BitNet, Symmetric
from slmjax.estimate import half_width, mean

QUANTIZERS: Mapping[str, Quantizer] = {
    "2 bits, absmax": Symmetric(bits=2),
    "2 bits, LSQ": LSQ(bits=2),
    "2 bits, SEQ": SEQ(),
    "2 bits, balanced": Balanced(),
    "ternary, SEQ": SEQ(levels=3),
    "ternary, BitNet": BitNet(),
    "binary": Binary(),
    "4 bits, LSQ": LSQ(bits=4),
}
DECAYS = (WEIGHT_DECAY, 0.0)


class Row(NamedTuple):
    """One run."""

    name: str
    weight_decay: float
    seed: int
    last: float
    """Loss with the last weights, nats a byte"""
    averaged: float
    """With the averaged ones"""


def rows_of(work: Path, seeds: int, only: str = "", steps: int = STEPS) -> list[Row]:
    """Every quantizer, weight decay and seed; full precision first."""
    rows = []
    for name in ("full precision", *(name for name in QUANTIZERS if only in name)):
        for decay in DECAYS:
            for seed in range(seeds):
                if name in QUANTIZERS:
                    folder = run(work, folder_name(name), seed, quantized(QUANTIZERS[name]), decay, steps)
                else:
                    folder = run(work, FULL, seed, weight_decay=decay, steps=steps)
                rows.append(Row(name, decay, seed, *losses(folder)))
    return rows


def effects(rows: Sequence[Row]) -> dict[str, dict[str, np.ndarray]]:
    """{quantizer: {what is changed: the change of the loss, by seed}}."""
    found: dict[tuple[str, float], dict[int, Losses]] = {}
    for row in rows:
        found.setdefault((row.name, row.weight_decay), {})[row.seed] = Losses(row.last, row.averaged)
    out: dict[str, dict[str, np.ndarray]] = {}
    for name in dict.fromkeys(row.name for row in rows):
        default, without = (found.get((name, decay), {}) for decay in DECAYS)
        pairs = [seed for seed in default if seed in without]
        full = found.get(("full precision", 0.0), {}), found.get(("full precision", WEIGHT_DECAY), {})
        out[name] = {
            "average": np.array([x.averaged - x.last for x in default.values()]),
            "average, no decay": np.array([x.averaged - x.last for x in without.values()]),
            "no decay": np.array([without[seed].last - default[seed].last for seed in pairs]),
            "no decay, of the gap": np.array(
                [
                    (without[seed].last - full[0][seed].last) - (default[seed].last - full[1][seed].last)
                    for seed in pairs
                    if seed in full[0] and seed in full[1]
                ]
            ),
        }
    return out


def verdict(change: np.ndarray) -> str:
    """`better`, `worse` or nothing: whether the 95% interval of the change of the loss excludes 0."""
    if len(change) < 2 or abs(mean(change).value) <= half_width(change):
        return ""
    return "better" if change.mean() < 0 else "worse"


def write(out: Path, rows: Sequence[Row], command: str) -> None:
    """Table and rows."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ablation.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        table.writerow(Row._fields)
        table.writerows((r.name, r.weight_decay, r.seed, f"{r.last:.6f}", f"{r.averaged:.6f}") for r in rows)
    found = effects(rows)
    columns = list(next(iter(found.values())))
    heads = {
        "average": f"averaged weights (decay {DECAY}) instead of the last",
        "average, no decay": "the same, without weight decay",
        "no decay": f"no weight decay instead of {WEIGHT_DECAY}",
        "no decay, of the gap": "the same, of the gap to full precision",
    }
    lines = [
        "# Averaged weights and weight decay, by quantizer", "",
        f"`{command}`: {len({r.seed for r in rows})} seeds, {STEPS} steps of 1024 bytes, the last quarter in "
        "quantization. Change of the loss on held-out text, nats a byte, negative where it helps, with 95% intervals "
        "over pairs of runs with the same seed (Student's t); a verdict stands where the interval excludes 0. Rows of "
        "single runs: [ablation.tsv](ablation.tsv).", "",
        f"| | {' | '.join(heads[c] for c in columns)} |", f"|---{'|---' * len(columns)}|",
    ]  # fmt: skip
    for name, changes in found.items():
        lines.append(f"| {name} | {' | '.join(_said(changes[c]) for c in columns)} |")
    (out / "ablation.md").write_text("\n".join([*lines, ""]), "utf-8")


def _said(change: np.ndarray) -> str:
    if not len(change):
        return ""
    if len(change) == 1:
        return f"{change[0]:+.4f} (one seed)"
    return f"{change.mean():+.4f} ± {half_width(change):.4f} {verdict(change)}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    args = options(__doc__, argv)
    rows = rows_of(args.work, args.seeds, args.only, args.steps)
    write(args.out, rows, f"python experiments/quantize/ablation.py --seeds {args.seeds}")
    sys.stdout.write((args.out / "ablation.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
