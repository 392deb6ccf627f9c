"""Where distillation pays, and where it does not: small students, paired over seeds.

    python experiments/distill/pays.py --seeds 5 --out docs/results/distill

Six questions, each with a cross-entropy (CE) baseline whose learning rate was tuned; the runs of one seed share
initial values and data, so a gain is a difference of pairs, with a 95% interval by Student's t.

1. A perfect teacher: text of a Markov chain, whose probabilities the teacher knows exactly (markov.py).
2. A teacher that has read ten times the student's bytes of English classics; also against CE that trains as long.
3. The same teacher, and a student that reads as much as the teacher did: what is left of the gain?
4. Targets on disk at equal bytes a token: sampled against top-k (Anshumann et al. 2025, arXiv:2503.16870).
5. Little text: a model that learns from four of its own size (ensemble.py), against one that reads the text.
6. A teacher that has read a tenth of the student's bytes: does it hurt?

Writes pays.md and pays.tsv (a row a run) into --out; runs that are complete are not repeated. About 40 minutes on one
core. Found (docs/results/distill/pays.md): a gain in 1 to 3 in every seed, in 3 half of that in 2; with as much time,
cross-entropy is far ahead of distillation in 2. Sampled targets beat top-k. Four averaged models beat one in 5, and
what the student keeps of that is within the noise. In 6 it hurts, by 0.16 nats.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ensemble
import jax
import jax.numpy as jnp
import markov
import numpy as np

import slmjax
from slmjax.config import Evaluation, Experiment, Runtime, Tracking
from slmjax.data.recipe import Recipe, load_recipe
from slmjax.data.spec import PackedText, Part
from slmjax.data.teacher_targets import TeacherTargets
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import Bytes
from slmjax.distill.objective import Distill
from slmjax.distill.offline import DistillOffline
from slmjax.distill.stored import Sampled, Stored, TopK
from slmjax.estimate import half_width
from slmjax.models.decoder import Decoder
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD
from slmjax.runs.evaluating import HeldOut, measure, opened
from slmjax.runs.loading import Loaded, load
from slmjax.runs.teacher_targets import Writing, write
from slmjax.runs.teaching import compared
from slmjax.track import jsonl
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Skip

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 300, 3000
"""Steps of 1024 tokens: of a student, and of the teacher"""
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
BATCHES = 8
"""Of 32 held-out sequences that figures are measured on"""
K = 8
"""Of top-k, whose bytes a token sampled targets may have"""


def student() -> Decoder:
    return llama(layers=2, width=48, heads=2, kv_heads=2, hidden=128, vocab=264, context=128, tied=True)


def teacher() -> Decoder:
    return llama(layers=5, width=64, heads=2, kv_heads=2, hidden=160, vocab=264, context=128, tied=True)


@cache
def english() -> Recipe:
    """Bytes of English classics."""
    return replace(load_recipe(ROOT / "data/recipes/english_classics.py"), name="english_bytes", tokenizer=Bytes())


class Row(NamedTuple):
    """One run."""

    question: int
    name: str
    seed: int
    loss: float
    """Nats a token on held-out text"""
    kl: float
    """KL(teacher || student) on held-out text, nats a token"""
    calibration: float
    """Expected calibration error: |confidence - accuracy| over 15 bins of the likeliest token's probability"""
    milliseconds: float
    """A step, median"""


class Lab(NamedTuple):
    """Where runs are kept."""

    work: Path

    def run(
        self, name: str, seed: int, text: Recipe, objective: ObjectiveSpec, *, model: Decoder, steps: int, rate: float,
        targets: str | None = None,
    ) -> Path:  # fmt: skip
        """Trains a model and returns the run folder."""
        data = PackedText(train=(Part(source=text),), length=128, batch=8, seed=seed)
        if targets is not None:
            data = replace(data, extra=TeacherTargets(folders=(targets,)))
        experiment = Experiment(
            name=name,
            model=model,
            data=data,
            objective=objective,
            schedule=WSD(peak_lr=rate, warmup_steps=min(50, steps // 10), decay_fraction=0.25),
            optimizer=AdamW(weight_decay=0.1),
            steps=steps,
            evaluation=Evaluation(every=0),
            guard=Skip(sigma=None),  # a spike is part of what a learning rate costs
            seed=seed,
        )
        return self.made(experiment)

    def made(self, experiment: Experiment) -> Path:
        """Trains, unless it is complete, and returns the run folder."""
        runtime = Runtime(
            workdir=str(self.work / f"{experiment.name}-{experiment.seed}"),
            data_dir=str(self.work / "data"),
            log_every=10,
            tracking=Tracking(wandb="disabled"),
            checkpoints=Checkpoints(every=0, keep_last=1),
        )
        return slmjax.train(experiment, runtime=runtime).folder

    def tuned(self, name: str, text: Recipe, steps: int) -> float:
        """The best of `RATES` for cross-entropy, with a seed that no comparison uses."""
        losses = {}
        for rate in RATES:
            folder = self.run(f"{name}-tune-{rate}", 100, text, NextToken(), model=student(), steps=steps, rate=rate)
            losses[rate] = loss_of(load(folder))
        return min(losses, key=lambda rate: losses[rate])

    def targets(self, teacher: Path, store: str, stored: Stored, name: str) -> tuple[str, float]:
        """The folder of a teacher's targets, and its bytes a token."""
        writing = Writing(
            loaded=load(teacher), name="teacher", store=TokenStore(store), out=self.work / name, stored=stored,
            length=128, compute=Compute(),
        )  # fmt: skip
        done = write(writing)
        assert done is not None
        return str(self.work / name), float(done.manifest["bytes_per_token"])


def held_out(loaded: Loaded) -> Any:
    return opened(HeldOut(batch=32), loaded)


def loss_of(loaded: Loaded) -> float:
    result: Any = measure(loaded, held_out(loaded), batches=BATCHES)
    return result.loss.value


def row(question: int, name: str, seed: int, folder: Path, teacher: Path) -> Row:
    """What a run came to."""
    loaded = load(folder)
    kl = compared(loaded, str(teacher), held_out(loaded), batches=BATCHES).kl.value
    return Row(question, name, seed, loss_of(loaded), kl, calibration_error(loaded), step_time(folder))


def validation(folder: Path, name: str) -> float:
    """The last value of a validation metric."""
    return [row[name] for row in jsonl.read(folder / "metrics.jsonl") if name in row][-1]


def step_time(folder: Path) -> float:
    """Milliseconds a step, the median; the first rows, which compile, are left out."""
    rows = jsonl.read(folder / "metrics.jsonl")
    return statistics.median(1024e3 / r["tokens_per_second"] for r in rows[3:])


def calibration_error(loaded: Loaded, bins: int = 15) -> float:
    """Guo et al. 2017, arXiv:1706.04599."""
    model = loaded.decoder.build()

    @jax.jit
    def found(params: Any, b: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.unembed(params, model.apply(params, b.tokens, b.positions, b.segment_ids).hidden)
        return jax.nn.softmax(logits).max(-1), jnp.argmax(logits, -1) == b.targets

    parts = []
    for batch in held_out(loaded).validation(BATCHES):
        confidence, right = found(loaded.params, batch)
        live = np.asarray(batch.weights) > 0
        parts.append((np.asarray(confidence)[live], np.asarray(right)[live]))
    confidence, right = (np.concatenate(x) for x in zip(*parts, strict=True))
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    sums = (np.bincount(at, x, bins) for x in (confidence, right.astype(float)))
    return float(np.abs(np.subtract(*sums)).sum() / len(confidence))


def hinton(teacher: Path, match: float = 0.5, temperature: float = 1.0) -> Distill:
    return Distill(teachers=(str(teacher),), match=match, cross_entropy=1 - match, temperature=temperature)


def little_text(lab: Lab, seeds: int) -> list[Row]:
    """Question 5. The learning rate is that of the file."""

    def trained(name: str, seed: int, objective: ObjectiveSpec) -> Path:
        base = ensemble.member()
        one = replace(base, name=name, seed=seed, data=replace(base.data, seed=seed), objective=objective)
        return lab.made(one)

    four = tuple(str(trained("member", 100 + i, NextToken())) for i in range(4))
    rows = []
    for seed in range(min(seeds, 3)):
        alone = trained("alone", seed, NextToken())
        taught = trained("of-four", seed, Distill(teachers=four, match=1.0, cross_entropy=0.0, temperature=1.0))
        for name, folder in (("alone", alone), ("distilled from four", taught)):
            loss = validation(folder, "validation/loss")
            rows.append(Row(5, name, seed, loss, math.nan, calibration_error(load(folder)), step_time(folder)))
        loss = validation(taught, "validation/teacher_loss")
        rows.append(Row(5, "the four, averaged", seed, loss, math.nan, math.nan, math.nan))
    return rows


def known_source(lab: Lab, seeds: int) -> list[Row]:
    """Question 1."""
    follows = markov.chain(0)
    text = markov.recipe(markov.documents(follows, 400_000, seed=1), lab.work, "markov")
    oracle, steps = lab.work / "oracle", 150
    if not oracle.exists():
        markov.save_oracle(follows, Bytes().make((), lab.work), oracle)
    rate = lab.tuned("markov", text, steps)
    rows = []
    for seed in range(seeds):
        for name, objective in (("CE", NextToken()), ("perfect teacher", hinton(oracle, match=1.0))):
            folder = lab.run(f"markov-{name}", seed, text, objective, model=student(), steps=steps, rate=rate)
            rows.append(row(1, name, seed, folder, oracle))
    return rows


def trained_teacher(lab: Lab, steps: int = LONG) -> Path:
    name = "teacher" if steps == LONG else f"teacher-{steps}"
    return lab.run(name, 0, english(), NextToken(), model=teacher(), steps=steps, rate=4e-3)


def more_text(lab: Lab, seeds: int) -> list[Row]:
    """Question 2."""
    taught = trained_teacher(lab)
    rate = lab.tuned("english", english(), SHORT)
    rows, longer = [], 0
    for seed in range(seeds):
        made = {}
        for name, objective in (("CE", NextToken()), ("distilled", hinton(taught))):
            made[name] = lab.run(f"short-{name}", seed, english(), objective, model=student(), steps=SHORT, rate=rate)
            rows.append(row(2, name, seed, made[name], taught))
        if not longer:  # the number of steps that CE makes in the time of distillation
            longer = round(SHORT * step_time(made["distilled"]) / step_time(made["CE"]))
        folder = lab.run("short-CE-as-long", seed, english(), NextToken(), model=student(), steps=longer, rate=rate)
        rows.append(row(2, "CE, as long", seed, folder, taught))
    return rows


def much_text(lab: Lab, seeds: int) -> list[Row]:
    """Question 3."""
    return _long(lab, seeds, 3, trained_teacher(lab), "long-distilled")


def young_teacher(lab: Lab, seeds: int) -> list[Row]:
    """Question 6."""
    return _long(lab, seeds, 6, trained_teacher(lab, SHORT), "long-young")


def _long(lab: Lab, seeds: int, question: int, taught: Path, name: str) -> list[Row]:
    rate, rows = lab.tuned("english", english(), SHORT), []
    for seed in range(seeds):
        for said, run, objective in (("CE", "long-CE", NextToken()), ("distilled", name, hinton(taught))):
            folder = lab.run(run, seed, english(), objective, model=student(), steps=LONG, rate=rate)
            rows.append(row(question, said, seed, folder, taught))
    return rows


def equal_bytes(lab: Lab, seeds: int) -> list[Row]:
    """Question 4."""
    taught, rate = trained_teacher(lab), lab.tuned("english", english(), SHORT)
    store = load(taught).config["stores"][0]["location"]
    topk, most = lab.targets(taught, store, TopK(k=K), f"top-{K}")
    draws, (sampled, least) = K, lab.targets(taught, store, Sampled(draws=K), f"sampled-{K}")
    while least < most and draws < 64:
        more, cost = lab.targets(taught, store, Sampled(draws=draws * 2), f"sampled-{draws * 2}")
        if cost > most:
            break
        draws, sampled, least = draws * 2, more, cost
    named = ((f"top-{K}, {most:.1f} bytes", topk), (f"{draws} draws, {least:.1f} bytes", sampled))
    rows = []
    for seed in range(seeds):
        for name, targets in named:
            folder = lab.run(
                f"stored-{Path(targets).name}", seed, english(), DistillOffline(match=1.0, cross_entropy=0.0),
                model=student(), steps=SHORT, rate=rate, targets=targets,
            )  # fmt: skip
            rows.append(row(4, name, seed, folder, taught))
    return rows


QUESTIONS = {
    1: ("A perfect teacher of a Markov chain, 150 steps", known_source),
    2: (f"A teacher that has read {LONG // SHORT} times as much, {SHORT} steps", more_text),
    3: (f"A student that reads as much as the teacher did, {LONG} steps", much_text),
    4: (f"Targets on disk alone, {SHORT} steps", equal_bytes),
    5: ("Little text: Moby-Dick, read 2.8 times", little_text),
    6: (f"A teacher that has read a tenth as much, {LONG} steps", young_teacher),
}


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the mean of each way, and its difference from the first, over seeds."""
    names = list(dict.fromkeys(r.name for r in rows))
    lines = ["| | loss | KL(teacher to student) | calibration error | ms a step | gain in loss | gain in KL |"]
    lines += ["|---|---|---|---|---|---|---|"]
    base = [r for r in rows if r.name == names[0]]
    for name in names:
        of = [r for r in rows if r.name == name]
        mean = {f: float(np.mean([getattr(r, f) for r in of])) for f in Row._fields[3:]}
        gains = ["", ""]
        if name != names[0]:
            for i, field in enumerate(("loss", "kl")):
                less = [getattr(b, field) - getattr(r, field) for b, r in zip(base, of, strict=True)]
                if math.isnan(less[0]):
                    continue
                better = sum(x > 0 for x in less)
                gains[i] = f"{np.mean(less):+.4f} ± {half_width(less):.4f} ({better} of {len(less)} seeds)"
        cells = [name, *("" if math.isnan(mean[f]) else f"{mean[f]:.4f}" for f in ("loss", "kl", "calibration"))]
        cells += ["" if math.isnan(mean["milliseconds"]) else str(round(mean["milliseconds"])), *gains]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/distill"))
    parser.add_argument("--work", type=Path, default=Path("runs/pays"), help="where the runs are kept")
    parser.add_argument("--only", type=int, nargs="*", default=list(QUESTIONS), help="questions, by number")
    args = parser.parse_args(argv)
    lab = Lab(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = "" if args.only == list(QUESTIONS) else f" --only {' '.join(map(str, args.only))}"
    lines = [
        "# Where distillation pays", "",
        f"`python experiments/distill/pays.py --seeds {args.seeds}{chosen}`. Nats a token (a byte) on held-out text; "
        "gains are differences of pairs from the first row, positive where the loss fell, with the 95% interval over "
        "seeds. "
        f"Every run: [pays.tsv](pays.tsv). Entropy of the chain: {markov.entropy(markov.chain(0)):.4f}.", "",
    ]  # fmt: skip
    found: list[Row] = []
    for number in args.only:
        title, ask = QUESTIONS[number]
        rows = ask(lab, args.seeds)
        found += rows
        lines += [f"## {number}. {title}", "", *table(rows), ""]
    with (args.out / "pays.tsv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        out.writerow(Row._fields)
        out.writerows((*r[:3], *(f"{x:.6f}" for x in r[3:])) for r in found)
    (args.out / "pays.md").write_text("\n".join(lines), "utf-8")
    sys.stdout.write("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
