"""The model of the experiments on quantization: 253,120 parameters that read bytes of English classics, 1000 steps of
1024 bytes, of which the last 250 are quantized while the learning rate decays.

    slmjax train experiments/quantize/byte_model.py --runtime.workdir runs/byte-model

trains it in full precision, in half a minute on two idle cores. `gaps.py`, `ablation.py` and `matrix.py` train it with
quantized weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import slmjax
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import Quantize, Rule, quantizes
from slmjax.config import Evaluation, Experiment, Runtime, Tracking
from slmjax.data.recipe import load_recipe
from slmjax.data.spec import Opened, PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.experiment_file import load_config
from slmjax.models.decoder import Decoder
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD
from slmjax.runs.branching import branch
from slmjax.runs.build import pieces, states_of
from slmjax.runs.evaluating import HeldOut, measure, opened
from slmjax.runs.loading import Loaded
from slmjax.serialise import from_json
from slmjax.track import jsonl
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import restore
from slmjax.train.guard import Skip
from slmjax.train.state import evaluation_params
from slmjax.views import EMA, Identity, View

ROOT = Path(__file__).resolve().parents[2]
STEPS, SHARE = 1000, 0.25
DECAY = 0.98
"""Of the average of the weights, whose loss is measured too: a window of about 50 steps"""
WEIGHT_DECAY = 0.1
PLAIN: View = Identity()
FULL = "full_precision"
"""Name of the runs that are not quantized"""
ROWS = 384
"""Held-out sequences that a loss is measured on"""


def model(width: int = 64, heads: int = 2, hidden: int = 160, layers: int = 5) -> Decoder:
    """A Llama that reads bytes."""
    return llama(
        layers=layers, width=width, heads=heads, kv_heads=heads, hidden=hidden, vocab=264, context=128, tied=True
    )


def parameters() -> int:
    return parameter_count(model())


def quantized(quantizer: Quantizer, share: float = SHARE) -> View:
    """The view that trains with a quantizer in the last `share` of the steps."""
    return Quantize(rules=(Rule(quantizer=quantizer),), share=share)


def experiment(
    seed: int = 0,
    of: View = PLAIN,
    weight_decay: float = WEIGHT_DECAY,
    steps: int = STEPS,
    name: str = "byte-model",
) -> Experiment:
    """A run, whose evaluation is that of averaged weights; averaging changes nothing in training.

    Args:
        of: the view that is trained.
    """
    text = replace(load_recipe(ROOT / "data/recipes/english_classics.py"), name="english_bytes", tokenizer=Bytes())
    batch = 8
    return Experiment(
        name=name,
        model=model(),
        data=PackedText(train=(Part(source=text),), length=128, batch=batch, seed=seed),
        schedule=WSD(peak_lr=4e-3, warmup_steps=min(50, steps // 10), decay_fraction=SHARE),
        optimizer=AdamW(weight_decay=weight_decay),
        steps=steps,
        evaluation=Evaluation(every=250, batches=ROWS // batch),
        guard=Skip(sigma=None),  # the loss rises when rounding begins
        view=EMA(decay=DECAY, of=of),
        seed=seed,
    )


def runtime(work: Path, name: str, steps: int = STEPS) -> Runtime:
    """A run in `work`; keeps the checkpoint of the step before the last share of the steps begins."""
    before = max(1, steps - round(steps * SHARE) - 1)
    return Runtime(
        workdir=str(work / name),
        data_dir=str(work / "data"),
        tracking=Tracking(wandb="disabled"),
        log_every=50,
        checkpoints=Checkpoints(every=0, keep_every=before, keep_last=1),
    )


class Losses(NamedTuple):
    """Of one run on held-out bytes, nats a byte."""

    last: float
    """With the weights of the last step"""
    averaged: float
    """With the average of the last weights"""


def run(
    work: Path,
    name: str,
    seed: int,
    of: View = PLAIN,
    weight_decay: float = WEIGHT_DECAY,
    steps: int = STEPS,
) -> Path:
    """Trains and returns the run folder; a run that is complete is not repeated.

    What is quantized in the last share of the steps alone begins as the run in full precision did, which is trained
    first where it is missing: the result is the same to the bit (`runs.branching`).
    """
    value = experiment(seed, of, weight_decay, steps, name)
    how = runtime(work, f"{seed}-{name}-wd{weight_decay}", steps)
    starts = [q.start or 0 for q in quantizes(value.view.over(steps))]
    if starts and min(starts) >= steps - round(steps * SHARE):
        branch(run(work, FULL, seed, weight_decay=weight_decay, steps=steps), value, how)
    return slmjax.train(value, runtime=how).folder


def losses(folder: Path) -> Losses:
    """Of a run that is complete."""
    import jax

    config = load_config(folder / "config.json")
    value: Experiment = from_json(config["experiment"])
    parts = pieces(value)
    state = restore(folder / "checkpoints", value.steps, states_of(value).abstract).state
    raw = jax.jit(
        lambda state: evaluation_params(state, parts.optimizer, parts.view._replace(evaluate=parts.view.apply))
    )
    loaded = Loaded(
        decoder=value.model, weights=raw(state), tokenizer_path=folder, source=folder, experiment=value, config=config
    )
    rows = [row for row in jsonl.read(folder / "metrics.jsonl") if "validation/loss" in row]
    return Losses(measured(loaded), rows[-1]["validation/loss"])


def held_out(loaded: Loaded) -> Opened:
    return opened(HeldOut(batch=32), loaded)


def measured(loaded: Loaded) -> float:
    """The loss on the first `ROWS` held-out sequences."""
    result: Any = measure(loaded, held_out(loaded), batches=ROWS // 32)
    return result.loss.value
