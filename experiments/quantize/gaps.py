"""What quantization costs, over seeds: a small byte-level model in full precision, trained in 8 to 1 bits, and rounded
after training.

    python experiments/quantize/gaps.py --seeds 3 --out docs/results

253,120 parameters, 1000 steps of 1024 bytes of English classics, of which the last 250 are quantized while the
learning rate decays. The runs of one seed share initial values and data, so a gap is a difference of pairs; intervals
are 95%, by Student's t over seeds. Writes quantization.md and quantization.png into --out; runs that are complete are
not repeated.

References: the methods' papers, in docs/compress.md; a reference run of this size had 2-bit gaps of 0.03 to 0.08 nats.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import slmjax
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule, with_values
from slmjax.config import Evaluation, Experiment, Runtime, Tracking
from slmjax.data.recipe import Recipe
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.experiment_file import load_module
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import WSD
from slmjax.runs.evaluating import HeldOut, measure, opened
from slmjax.runs.loading import load
from slmjax.runs.quantizing import METHODS, silent
from slmjax.train.guard import Skip
from slmjax.views import EMA, Identity, View

ROOT = Path(__file__).resolve().parents[2]
STEPS, SHARE = 1000, 0.25


def of(quantizer: Quantizer) -> View:
    return Quantize(rules=(Rule(quantizer=quantizer),), share=SHARE)


TRAINED: dict[str, tuple[float, View]] = {
    "8 bits, absmax": (8, of(Symmetric(bits=8))),
    "4 bits, LSQ": (4, of(LSQ(bits=4))),
    "3 bits, LSQ": (3, of(LSQ(bits=3))),
    "2 bits, absmax": (2, of(Symmetric(bits=2))),
    "2 bits, LSQ": (2, of(LSQ(bits=2))),
    "2 bits, SEQ": (2, of(SEQ())),
    "2 bits, balanced": (2, of(Balanced())),
    "2 bits, balanced, averaged": (2, EMA(decay=0.98, of=of(Balanced()))),
    "ternary, SEQ": (1.58, of(SEQ(levels=3))),
    "ternary, BitNet": (1.58, of(BitNet())),
    "binary": (1, of(Binary())),
}
ROUNDED: dict[str, tuple[float, str, Quantizer]] = {
    "4 bits, GPTQ": (4, "gptq", Symmetric(bits=4)),
    "3 bits, GPTQ": (3, "gptq", Symmetric(bits=3)),
    "2 bits, nearest, absmax": (2, "rtn", Symmetric(bits=2)),
    "2 bits, nearest, searched scale": (2, "rtn-mse", Balanced()),
    "2 bits, GPTQ": (2, "gptq", Balanced()),
}


def experiment(seed: int = 0, view: View = Identity()) -> Experiment:  # noqa: B008
    classics: Recipe = load_module(ROOT / "data/recipes/english_classics.py").recipe()
    named: Any = classics.sources
    sources = tuple(replace(s, path=str(ROOT / "data/english_classics" / Path(s.path).name)) for s in named)
    text = replace(classics, name="english_bytes", sources=sources, tokenizer=Bytes())
    return Experiment(
        name="gaps",
        model=llama(layers=5, width=64, heads=2, kv_heads=2, hidden=160, vocab=264, context=128, tied=True),
        data=PackedText(train=(Part(source=text),), length=128, batch=8, seed=seed),
        schedule=WSD(peak_lr=4e-3, warmup_steps=50, decay_fraction=SHARE),
        steps=STEPS,
        evaluation=Evaluation(every=0),
        guard=Skip(sigma=None),  # the loss rises when rounding begins
        view=view,
        seed=seed,
    )


def measured(loaded: Any, data: Any) -> float:
    return measure(loaded, data, batches=12).loss.value


def losses(seed: int, work: Path) -> dict[str, float]:
    """The loss of each method with one seed, nats a byte."""
    runtime = Runtime(data_dir=str(work / "data"), tracking=Tracking(wandb="disabled"), log_every=50)

    def trained(name: str, view: View) -> Any:
        folder = work / f"{seed}-{name.replace(', ', '-').replace(' ', '_')}"
        slmjax.train(experiment(seed, view), workdir=folder, runtime=runtime)
        return load(folder)

    full = trained("full precision", Identity())
    data = opened(HeldOut(batch=32), full)
    found = {"full precision": measured(full, data)}
    for name, (_, view) in TRAINED.items():
        found[f"trained: {name}"] = measured(trained(name, view), data)
    batches = tuple(data.validation(12))
    for name, (_, method, quantizer) in ROUNDED.items():
        packed = METHODS[method](full.decoder, full.params, (Rule(quantizer=quantizer),), batches, silent)
        found[f"rounded: {name}"] = measured(replace(full, params=with_values(full.params, packed)), data)
    return found


def interval(values: np.ndarray) -> float:
    """Half the width of the 95% interval of the mean."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def write(out: Path, seeds: list[dict[str, float]], command: str) -> None:
    full = np.array([s["full precision"] for s in seeds])
    gaps = {name: np.array([s[name] for s in seeds]) - full for name in seeds[0] if name != "full precision"}
    lines = [
        "# What quantization costs", "",
        f"`{command}`: {len(seeds)} seeds, {STEPS} steps; matrices of the layers, a scale for each output channel.", "",
        f"Full precision: {full.mean():.4f} nats a byte (seeds: {', '.join(f'{x:.4f}' for x in full)}).", "",
        "| | loss above full precision, nats a byte | 95% interval |", "|---|---|---|",
        *(f"| {name} | {gap.mean():.4f} | ± {interval(gap):.4f} |" for name, gap in gaps.items()), "",
        "![Gaps by bits](quantization.png)", "",
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "quantization.md").write_text("\n".join(lines), "utf-8")
    draw(out / "quantization.png", gaps)


def draw(file: Path, gaps: dict[str, np.ndarray]) -> None:
    """Gap against bits, one mark a method."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    bits = {f"trained: {name}": b for name, (b, _) in TRAINED.items()}
    bits |= {f"rounded: {name}": b for name, (b, *_) in ROUNDED.items()}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, gap in gaps.items():
        mark = "o" if name.startswith("trained") else "x"
        axes.errorbar(bits[name], max(gap.mean(), 1e-4), yerr=interval(gap), fmt=mark, capsize=3, label=name)
    axes.set(xlabel="bits a weight", ylabel="loss above full precision, nats a byte", yscale="log")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/gaps"), help="the runs; those complete are not repeated"
    )
    args = parser.parse_args()
    found = [losses(seed, args.work) for seed in range(args.seeds)]
    write(args.out, found, f"python experiments/quantize/gaps.py --seeds {args.seeds}")
    sys.stdout.write((args.out / "quantization.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
