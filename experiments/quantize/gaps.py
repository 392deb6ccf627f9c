"""What quantization costs, over seeds: a small byte-level model in full precision, trained in 8 to 1 bits, and rounded
after training.

    python experiments/quantize/gaps.py --seeds 3 --out docs/results/quantize

The model of `byte_model.py`. The runs of one seed share initial values and data, so a gap is a difference of pairs;
intervals are 95%, by Student's t over seeds. Writes gaps.md, gaps.tsv (a row a run) and gaps.png (loss against bytes on
disk) into --out; runs that are complete are not repeated. About 15 minutes on two idle cores.

Expected: 2 bits cost 0.03 to 0.08 nats a byte if they are trained, 0.3 to 0.5 if weights are rounded afterwards, by a
reference run of this size. References: the methods' papers, in docs/compress.md.
"""

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from byte_model import (
    FULL,
    STEPS,
    WEIGHT_DECAY,
    Losses,
    experiment,
    held_out,
    losses,
    measured,
    model,
    parameters,
    quantized,
    run,
)

from slmjax.compress.quant.budget import fraction
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import BitNet, Symmetric
from slmjax.compress.quant.view import Rule
from slmjax.config import Experiment
from slmjax.estimate import half_width
from slmjax.runs.carriers import Size, sizes
from slmjax.runs.loading import load
from slmjax.runs.quantizing import METHODS, silent
from slmjax.track.picture import Mark, Panel, scatter

__all__ = ["experiment"]

LAW = round(fraction(STEPS * 1024, parameters(), bits=2), 3)
BATCHES = 12
"""Of held-out data that rounding calibrates on"""
WIDE = 1024
"""Width of the model whose bits a weight are given beside those of the small one, which fits fewer types"""


class Way(NamedTuple):
    """A way to fewer bits."""

    bits: float
    quantizer: Quantizer
    method: str = ""
    """Of rounding after training; empty: trained"""
    share: float = 0.25
    """Of the steps that are trained with rounded weights"""
    weight_decay: float = WEIGHT_DECAY


WAYS: dict[str, Way] = {
    "8 bits, absmax": Way(8, Symmetric(bits=8)),
    "4 bits, LSQ": Way(4, LSQ(bits=4)),
    "3 bits, LSQ": Way(3, LSQ(bits=3)),
    "2 bits, absmax": Way(2, Symmetric(bits=2)),
    "2 bits, LSQ": Way(2, LSQ(bits=2)),
    "2 bits, SEQ": Way(2, SEQ()),
    "2 bits, balanced": Way(2, Balanced()),
    "2 bits, balanced, no weight decay": Way(2, Balanced(), weight_decay=0.0),
    "2 bits, SEQ, from scratch": Way(2, SEQ(), share=1.0),
    "2 bits, SEQ, share of the law": Way(2, SEQ(), share=LAW),
    "2 bits, balanced, share of the law": Way(2, Balanced(), share=LAW),
    "ternary, SEQ": Way(1.58, SEQ(levels=3)),
    "ternary, BitNet": Way(1.58, BitNet()),
    "binary": Way(1, Binary()),
    "8 bits, nearest": Way(8, Symmetric(bits=8), "rtn"),
    "4 bits, nearest": Way(4, Symmetric(bits=4), "rtn"),
    "4 bits, GPTQ": Way(4, Symmetric(bits=4), "gptq"),
    "3 bits, GPTQ": Way(3, Symmetric(bits=3), "gptq"),
    "2 bits, nearest, absmax": Way(2, Symmetric(bits=2), "rtn"),
    "2 bits, nearest, searched scale": Way(2, Balanced(), "rtn-mse"),
    "2 bits, GPTQ": Way(2, Balanced(), "gptq"),
    "ternary, GPTQ": Way(1.58, SEQ(levels=3), "gptq"),
    "binary, nearest, searched scale": Way(1, Binary(), "rtn-mse"),
}


class Row(NamedTuple):
    """One run."""

    name: str
    seed: int
    loss: float
    """Nats a byte"""
    averaged: float
    """With averaged weights; nan for what is rounded after training"""
    gap: float
    """`loss` above full precision with the same seed"""
    averaged_gap: float


def folder_name(name: str) -> str:
    """Of a run: `2 bits, SEQ` -> `2_bits-SEQ`."""
    return name.replace(", ", "-").replace(" ", "_")


def rows_of(seed: int, work: Path, ways: Mapping[str, Way], steps: int = STEPS) -> list[Row]:
    """What each way loses with one seed."""
    folder = run(work, FULL, seed, steps=steps)
    full = losses(folder)
    rows = [Row("full precision", seed, *full, 0.0, full.averaged - full.last)]
    # rounding starts from the averaged weights, as `slmjax quantize` would; at the end of the decay both are the same
    parent = load(folder)
    data = held_out(parent)
    batches = tuple(data.validation(2 * BATCHES))[BATCHES:]  # not those that the loss is measured on
    for name, way in ways.items():
        if way.method:
            rules = (Rule(quantizer=way.quantizer),)
            done = METHODS[way.method](parent.decoder, parent.params, rules, batches, silent)
            loss = measured(replace(parent, weights=done.params))
            found = Losses(loss, float("nan"))
        else:
            view = quantized(way.quantizer, way.share)
            alike = name.removesuffix(", no weight decay")  # a folder's name has the weight decay
            found = losses(run(work, folder_name(alike), seed, view, way.weight_decay, steps))
        rows.append(Row(name, seed, *found, found.last - full.last, found.averaged - full.last))
    return rows


def by_name(rows: Sequence[Row], field: str) -> dict[str, np.ndarray]:
    """{name: the values of a field, by seed}."""
    names = dict.fromkeys(row.name for row in rows)
    return {name: np.array([getattr(row, field) for row in rows if row.name == name]) for name in names}


def gates(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is to hold of the mean gaps of `WAYS`: a sentence with the figures, and whether it does."""
    gaps, averaged = by_name(rows, "gap"), by_name(rows, "averaged_gap")
    mean = {name: float(gap.mean()) for name, gap in gaps.items() if name in WAYS}
    trained = {name: min(mean[name], float(averaged[name].mean())) for name in mean if not WAYS[name].method}
    rounded = {name: x for name, x in mean.items() if WAYS[name].method}

    def best(of: Mapping[str, float], bits: float) -> float:
        return min(x for name, x in of.items() if WAYS[name].bits == bits)

    two, after, plain = best(trained, 2), best(rounded, 2), mean["2 bits, absmax"]
    order = [best(trained, bits) for bits in (4, 3, 2, 1)]
    return [
        (f"trained in 2 bits: {two:.4f}, at most a quarter of what rounding loses, {after:.4f}", two <= 0.25 * after),
        (f"the best 2 bits, {two:.4f}, at least a quarter below absmax, {plain:.4f}", two <= 0.75 * plain),
        (f"4, 3, 2 and 1 bits in order: {', '.join(f'{x:.4f}' for x in order)}", order == sorted(order)),
    ]


@cache
def stored(quantizer: Quantizer | None, width: int | None = None) -> dict[str, Size]:
    """What the model takes in each format; with `width`, a model of that width."""
    base: Experiment = experiment(of=quantized(quantizer)) if quantizer else experiment()
    wide = base if width is None else replace(base, model=model(width=width, heads=width // 64, hidden=4 * width))
    return sizes(wide)


def write(out: Path, stem: str, title: str, rows: Sequence[Row], ways: Mapping[str, Way], command: str) -> None:
    """STEM.md with a table, STEM.tsv with a row a run, and STEM.png, loss against bytes."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{stem}.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        table.writerow(Row._fields)
        table.writerows((r.name, r.seed, *(f"{x:.6f}" for x in r[2:])) for r in rows)
    gaps, averaged = by_name(rows, "gap"), by_name(rows, "averaged_gap")
    full = by_name(rows, "loss")["full precision"]
    lines = [
        f"# {title}", "",
        f"`{command}`: {len(full)} seeds; experiments/quantize/byte_model.py, {parameters():,} parameters; "
        "the matrices of the layers are quantized. Loss above full precision with the same seed, nats a byte, with the "
        '95% interval over seeds (Student\'s t); "averaged" is the loss with an average of the last weights (a window '
        f"of 50 steps). Rows of single runs: [{stem}.tsv]({stem}.tsv).", "",
        f"Full precision: {full.mean():.4f} nats a byte (seeds: {', '.join(f'{x:.4f}' for x in full)}).", "",
        "Bytes are those of all tensors, tables and norms in 16 bits included, and bits those of a quantized weight "
        "with its scales: CT in a Hugging Face folder (compressed-tensors), GGUF in llama.cpp's types. Where the width "
        f"of this model fits no smaller type, GGUF takes a larger one; so the bits at width {WIDE} follow.", "",
        "| | gap | averaged | bytes, CT | bits, CT | bytes, GGUF | bits, GGUF | "
        f"bits, CT, width {WIDE} | bits, GGUF, width {WIDE} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    marks: dict[str, list[Mark]] = {}
    for name in gaps:
        way = ways.get(name)
        small, wide = (stored(way and way.quantizer, width) for width in (None, WIDE))
        how = "full precision" if way is None else f"rounded: {name}" if way.method else f"trained: {name}"
        cells = [
            how,
            _said(gaps[name], len(full)) if way else "",
            "" if way and way.method else _said(averaged[name], len(full)),
        ]
        for format in ("Hugging Face", "GGUF"):
            cells += [f"{small[format].bytes:,}", f"{small[format].bits:.2f}"] if format in small else ["", ""]
            if format in small:
                group, around = how.partition(":")[0], half_width(gaps[name]) if way else math.nan
                height = full.mean() + gaps[name].mean()  # of pairs, also where a row has fewer seeds
                mark = Mark(name, small[format].bytes / 1000, height, around, group)
                marks.setdefault(format, []).append(mark)
        cells += [f"{wide[format].bits:.2f}" if format in wide else "" for format in ("Hugging Face", "GGUF")]
        lines.append(f"| {' | '.join(cells)} |")
    picture = f"Loss against bytes on disk; intervals are those of the gap. ![Loss against bytes]({stem}.png)"
    (out / f"{stem}.md").write_text("\n".join([*lines, "", picture, ""]), "utf-8")
    panels = [Panel(name, "kilobytes of all tensors", each) for name, each in marks.items()]
    label, most = "loss on held-out text, nats a byte", float(full.mean()) + 0.2
    scatter(out / f"{stem}.png", panels, y_label=label, most=most)


def _said(values: np.ndarray, seeds: int) -> str:
    """A mean with its interval; says where it is of fewer seeds than the others."""
    around = f" ± {half_width(values):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{around}{'' if len(values) == seeds else f' (seeds: {len(values)})'}"


def options(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """What the commands of these experiments have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("docs/results/quantize"))
    parser.add_argument("--work", type=Path, default=Path("runs/gaps"), help="where the runs are kept")
    parser.add_argument("--only", default="", help="rows whose name contains this, for a quick look")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a gate does not hold."""
    args = options(__doc__, argv)
    ways = {name: way for name, way in WAYS.items() if args.only in name}
    rows = [row for seed in range(args.seeds) for row in rows_of(seed, args.work, ways, args.steps)]
    command = f"python experiments/quantize/gaps.py --seeds {args.seeds}"
    write(args.out, "gaps", "What quantization costs", rows, ways, command)
    checked = gates(rows) if len(ways) == len(WAYS) else []
    verdicts = [f"| {said} | {'pass' if holds else 'FAIL'} |" for said, holds in checked]
    text = (args.out / "gaps.md").read_text("utf-8")
    if checked:
        text += "\n".join(["", "| what is to hold of the means | |", "|---|---|", *verdicts, ""])
    (args.out / "gaps.md").write_text(text, "utf-8")
    sys.stdout.write(text)
    return 0 if all(holds for _, holds in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
