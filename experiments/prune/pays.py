"""What pruning costs, and what training afterwards brings back: a small byte-level model, over seeds.

    python experiments/prune/pays.py --seeds 3 --out docs/results/prune

The model is that of experiments/quantize/byte_model.py: 1000 steps of 1024 bytes of English classics. Two tables:

1. Half of the weights of its layers become zero: in one shot by magnitude, Wanda or SparseGPT, anywhere or 2 of each 4
   inputs, without training afterwards; or gradually while the model trains, by magnitude or movement.
2. It is cut to a smaller shape: 3 of its 5 layers, half of the hidden channels of its feed-forward layers, or 3/4 of
   the residual stream, chosen by importance or at random. The cut model then trains 250 steps, with cross-entropy or
   from the model that it was cut from, and so does a model of that shape from scratch: the same tokens in each case.

The runs of one seed share data, so a difference is one of pairs; intervals are 95%, by Student's t over seeds. The
learning rate of each kind of run is tuned with a seed that the tables do not use. Complete runs are not repeated.
About 25 minutes on one core with AVX-512 and AMX.

Expected, by the methods' papers (docs/prune.md): SparseGPT loses less than Wanda, and Wanda less than magnitude; the
important parts are worth more than random ones; and to prune and distil beats to train from scratch. Found
(docs/results/prune/pays.md): all of that but one: where half of the weights go, anywhere, Wanda loses more than
magnitude. It chooses among the weights of one output, magnitude among those of a matrix; magnitude within each output
loses as much as Wanda does.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import slmjax
from slmjax.compress.prune import oneshot
from slmjax.compress.prune.masks import PerLayer
from slmjax.compress.prune.view import Cubic, Movement, Prune
from slmjax.config import Evaluation, Experiment, Runtime, Tracking
from slmjax.distill.objective import Distill
from slmjax.estimate import half_width
from slmjax.experiment_file import load_experiment
from slmjax.models.assembly import Assembly
from slmjax.models.slicing import keep_hidden, keep_layers, keep_width
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.optim.schedules import WSD
from slmjax.runs import pruning, pruning_folder, pruning_width
from slmjax.runs.calibrating import Grams
from slmjax.runs.evaluating import HeldOut, measure, opened
from slmjax.runs.loading import Loaded, load
from slmjax.runs.pruning_parts import Pruning, as_numpy
from slmjax.runs.quantizing import silent
from slmjax.start import FromModel, FromScratch, Start
from slmjax.train.checkpoint import Checkpoints
from slmjax.types import Batch, Params
from slmjax.views import Identity, View

ROOT = Path(__file__).resolve().parents[2]
STEPS, AFTER = 1000, 250
"""Steps of the whole model, and of training after it was cut"""
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TUNING = 100
"""Seed of the runs that choose a learning rate"""
BATCHES = 12
"""Of 32 held-out sequences that a loss is measured on; as many others calibrate"""
PLAIN: View = Identity()
SCRATCH: Start = FromScratch()


@dataclass(frozen=True, kw_only=True)
class WithinOutputs(pruning.Wanda):
    """By magnitude alone, among the weights of one output like Wanda: all inputs count alike."""

    def one(self, path: str, layer: int, w: np.ndarray, found: Grams | None) -> oneshot.Pruned:
        return oneshot.wanda(w, np.eye(w.shape[1]), self.sparsity, m=self.m)


ONE_SHOT: Mapping[str, Pruning] = {
    "magnitude": pruning.Magnitude(sparsity=0.5),
    "magnitude, within each output": WithinOutputs(sparsity=0.5),
    "Wanda": pruning.Wanda(sparsity=0.5),
    "SparseGPT": pruning.SparseGPT(sparsity=0.5),
    "magnitude, 2:4": pruning.Magnitude(sparsity=0.5, m=4),
    "Wanda, 2:4": pruning.Wanda(sparsity=0.5, m=4),
    "SparseGPT, 2:4": pruning.SparseGPT(sparsity=0.5, m=4),
}
_RISES = Cubic(final=0.5, start=STEPS // 4, every=STEPS // 40, times=20)
WHILE_TRAINING: Mapping[str, View] = {
    "gradual magnitude, while training": Prune(schedule=_RISES, scope=PerLayer()),
    "movement, while training": Movement(schedule=_RISES, scope=PerLayer()),
}
Chosen = Callable[[Assembly, Params, np.random.Generator], tuple[Assembly, Params]]


class Cut(NamedTuple):
    """A way to a smaller shape: by importance, and at random."""

    important: Pruning
    random: Chosen


def _some(rng: np.random.Generator, of: int, keep: int) -> list[int]:
    return sorted(rng.choice(of, keep, replace=False).tolist())


def _random_layers(model: Any, params: Params, rng: np.random.Generator) -> tuple[Assembly, Params]:
    return keep_layers(model, params, _some(rng, model.layers, round(model.layers * 0.6)))


def _random_hidden(model: Any, params: Params, rng: np.random.Generator) -> tuple[Assembly, Params]:
    widths = [block.mlp.hidden for block in model.blocks()]
    return keep_hidden(model, params, [_some(rng, hidden, hidden // 2) for hidden in widths])


def _random_width(model: Any, params: Params, rng: np.random.Generator) -> tuple[Assembly, Params]:
    return keep_width(model, params, _some(rng, model.width, model.width * 3 // 4))


CUTS: Mapping[str, Cut] = {
    "3 of 5 layers": Cut(pruning.Depth(sparsity=0.4), _random_layers),
    "half of the hidden channels": Cut(pruning_width.Hidden(sparsity=0.5), _random_hidden),
    "3/4 of the residual stream": Cut(pruning_width.Channels(sparsity=0.25), _random_width),
}


class Row(NamedTuple):
    """One model."""

    part: str
    """`one shot`, or the name of a cut"""
    name: str
    seed: int
    loss: float
    """Nats a byte on held-out text"""
    gap: float
    """Above the whole model with the same seed"""


@cache
def whole() -> Experiment:
    """The model that is pruned, as byte_model.py defines it, without averaged weights."""
    base, _ = load_experiment(str(ROOT / "experiments/quantize/byte_model.py"))
    return replace(base, view=PLAIN, evaluation=Evaluation(every=0))


class Lab(NamedTuple):
    """Where runs are kept."""

    work: Path

    def run(
        self, name: str, seed: int, *, rate: float, steps: int, model: Assembly | None = None,
        objective: ObjectiveSpec | None = None, start: Start = SCRATCH, view: View = PLAIN,
    ) -> Path:  # fmt: skip
        """Trains a model and returns the run folder; a run that is complete is not repeated."""
        base = whole()
        value = replace(
            base,
            name=name,
            model=model or base.model,
            data=replace(base.data, seed=seed),
            objective=objective or NextToken(),
            schedule=WSD(peak_lr=rate, warmup_steps=min(50, steps // 10), decay_fraction=0.25),
            steps=steps,
            start=start,
            view=view,
            seed=seed,
        )
        runtime = Runtime(
            workdir=str(self.work / f"{seed}-{name.replace(' ', '_').replace('/', '_')}"),
            data_dir=str(self.work / "data"),
            log_every=50,
            tracking=Tracking(wandb="disabled"),
            checkpoints=Checkpoints(every=0, keep_last=1),
        )
        return slmjax.train(value, runtime=runtime).folder

    def parent(self, seed: int) -> Path:
        return self.run("whole", seed, rate=4e-3, steps=STEPS)

    def kept(self, name: str, seed: int, parent: Loaded, made: Callable[[], tuple[Assembly, Params]]) -> Path:
        """The folder of a pruned model, as `slmjax prune` writes it."""
        out = self.work / f"{seed}-{name.replace(' ', '_').replace('/', '_')}-cut"
        if not out.exists():
            pruning_folder.write(out, parent, *as_numpy(*made()), {"method": name})
        return out

    def after(self, kind: str, name: str, seed: int, rate: float) -> Path:
        """Trains a model that was cut, or one of its shape from scratch, for `AFTER` steps."""
        parent = self.parent(seed)
        cut = self.cut(name, seed, random=kind == "distilled, random parts")
        start = SCRATCH if kind.startswith("from scratch") else FromModel(model=str(cut))
        taught = Distill(teachers=(str(parent),), match=1.0, cross_entropy=0.0, temperature=1.0)
        objective = taught if "distilled" in kind else NextToken()
        return self.run(
            f"{name}, {kind}, {rate}", seed, rate=rate, steps=AFTER, model=load(cut).decoder, objective=objective,
            start=start,
        )  # fmt: skip

    def cut(self, name: str, seed: int, random: bool = False) -> Path:
        parent, way = load(self.parent(seed)), CUTS[name]
        if random:
            rng = np.random.default_rng(seed)
            return self.kept(f"{name}, random", seed, parent, lambda: way.random(parent.decoder, parent.params, rng))
        batches = () if not way.important.reads_data else calibration(parent)
        return self.kept(name, seed, parent, lambda: way.important(parent.decoder, parent.params, batches, silent))

    def tuned(self, kind: str, name: str) -> float:
        """The best of `RATES` for this kind of run."""
        losses = {rate: loss_of(load(self.after(kind, name, TUNING, rate))) for rate in RATES}
        return min(losses, key=lambda rate: losses[rate])


def held_out(loaded: Loaded) -> Any:
    return opened(HeldOut(batch=32), loaded)


def calibration(loaded: Loaded) -> tuple[Batch, ...]:
    """Batches that no loss is measured on."""
    return tuple(held_out(loaded).validation(2 * BATCHES))[BATCHES:]


def loss_of(loaded: Loaded, of: Loaded | None = None) -> float:
    """On the first held-out sequences of the run `of`."""
    result: Any = measure(loaded, held_out(of or loaded), batches=BATCHES)
    return result.loss.value


def zeroed(lab: Lab, seeds: Sequence[int]) -> list[Row]:
    """Table 1."""
    rows = []
    for seed in seeds:
        parent = load(lab.parent(seed))
        before, batches = loss_of(parent), calibration(parent)
        rows.append(Row("one shot", "whole", seed, before, 0.0))
        for name, method in ONE_SHOT.items():
            _, params = method(parent.decoder, parent.params, batches, silent)
            loss = loss_of(replace(parent, weights=params))
            rows.append(Row("one shot", name, seed, loss, loss - before))
        for name, view in WHILE_TRAINING.items():
            loss = loss_of(load(lab.run(name, seed, rate=4e-3, steps=STEPS, view=view)))
            rows.append(Row("one shot", name, seed, loss, loss - before))
    return rows


KINDS = ("cross-entropy", "distilled", "distilled, random parts", "from scratch", "from scratch, distilled")


def shrunk(lab: Lab, seeds: Sequence[int], name: str) -> list[Row]:
    """Table 2: one cut."""
    tuned = {kind: lab.tuned(kind, name) for kind in KINDS if kind != "distilled, random parts"}
    tuned["distilled, random parts"] = tuned["distilled"]
    rows = []
    for seed in seeds:
        parent = load(lab.parent(seed))
        before = loss_of(parent)
        for said, random in (("as cut", False), ("as cut, random parts", True)):
            loss = loss_of(load(lab.cut(name, seed, random)), of=parent)
            rows.append(Row(name, said, seed, loss, loss - before))
        for kind in KINDS:
            loss = loss_of(load(lab.after(kind, name, seed, tuned[kind])))
            rows.append(Row(name, f"{kind}, rate {tuned[kind]}", seed, loss, loss - before))
    return rows


def gaps(rows: Sequence[Row], part: str) -> dict[str, np.ndarray]:
    """{name: the gaps, by seed}; of runs, without their learning rate."""
    names = dict.fromkeys(r.name for r in rows if r.part == part)
    return {
        name.partition(", rate")[0]: np.array([r.gap for r in rows if r.part == part and r.name == name])
        for name in names
    }


def gates(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is to hold of the mean gaps: a sentence with the figures, and whether it does."""
    found, said = gaps(rows, "one shot"), []
    for pattern in ("", ", 2:4"):
        order = [float(found[f"{name}{pattern}"].mean()) for name in ("SparseGPT", "Wanda", "magnitude")]
        figures = ", ".join(f"{x:.4f}" for x in order)
        said.append((f"SparseGPT, Wanda, magnitude{pattern} in order: {figures}", order == sorted(order)))
    for cut in CUTS:
        mean = {name: float(gap.mean()) for name, gap in gaps(rows, cut).items()}
        for better, worse in (
            ("as cut", "as cut, random parts"),
            ("distilled", "distilled, random parts"),
            ("distilled", "from scratch"),
        ):
            text = f"{cut}: {better}, {mean[better]:.4f}, below {worse}, {mean[worse]:.4f}"
            said.append((text, mean[better] < mean[worse]))
    return said


def table(rows: Sequence[Row], part: str) -> list[str]:
    lines = [f"## {part[0].upper()}{part[1:]}", "", "| | loss | above the whole model |", "|---|---|---|"]
    for name in dict.fromkeys(r.name for r in rows if r.part == part):
        of = [r for r in rows if r.part == part and r.name == name]
        gap = np.array([r.gap for r in of])
        around = f" ± {half_width(gap):.4f}" if len(gap) > 1 else ""
        cells = [name, f"{np.mean([r.loss for r in of]):.4f}", "" if name == "whole" else f"{gap.mean():.4f}{around}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/prune"))
    parser.add_argument("--work", type=Path, default=Path("runs/prune"), help="where the runs are kept")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    lab, seeds = Lab(args.work), range(args.seeds)
    rows = zeroed(lab, seeds)
    for name in CUTS:
        rows += shrunk(lab, seeds, name)
    lines = [
        "# What pruning costs, and what training brings back", "",
        f"`python experiments/prune/pays.py --seeds {args.seeds}`: {args.seeds} seeds. Nats a byte on held-out text; "
        "differences are of pairs with the same seed, with the 95% interval over seeds (Student's t). Models that were "
        f"cut, and those from scratch, train {AFTER} steps of 1024 bytes; the whole model trained {STEPS}. Every run: "
        "[pays.tsv](pays.tsv).", "",
    ]  # fmt: skip
    for part in dict.fromkeys(r.part for r in rows):
        lines += table(rows, part)
    checked = gates(rows)
    verdicts = [f"| {said} | {'pass' if holds else 'FAIL'} |" for said, holds in checked]
    lines += ["| what is to hold of the means | |", "|---|---|", *verdicts, ""]
    with (args.out / "pays.tsv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        out.writerow(Row._fields)
        out.writerows((*r[:3], *(f"{x:.6f}" for x in r[3:])) for r in rows)
    (args.out / "pays.md").write_text("\n".join(lines), "utf-8")
    sys.stdout.write("\n".join(lines))
    return 0 if all(holds for _, holds in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
