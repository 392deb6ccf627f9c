"""A scaling law on two cores: 28 runs of models of 4 to 250 thousand parameters, and a larger one that is predicted.

    slmjax sweep plan experiments/scaling/chinchilla_cpu.py --out runs/chinchilla
    slmjax sweep run runs/chinchilla
    slmjax sweep report runs/chinchilla

Four budgets of compute, five widths each around the one that is expected to be best, three seeds of one width of each,
and a held-out run of six times the largest budget, whose loss is predicted before it runs. Every run reads 10 MB of
English classics as bytes at most once, and is evaluated on the same half million bytes.

Every model has two layers: with one for each 24 channels, seeds of a model of one layer differed by 2.4%, the loss fell
by a step from one layer to two, and the held-out loss was predicted with an interval of 9%.

Initial values have a standard deviation of 1 / sqrt(width): the usual 0.02 is far too little for a width of 16 (with it
the best size of the smallest budget ends at 2.97 nats a byte, and seeds differ by 4%; with 0.2 at 2.45).

The learning rate falls with the budget, as `PEAK_LR` says. It was tuned at three budgets, one width and one seed each
(28, 40 and 56 channels; `learning_rates` is such a sweep): .032, .015 and .011 are where parabolas over the logarithm
of the rate have their lowest point. With the law of DeepSeek-AI (2024, arXiv:2401.02954), which falls with the power
0.125 and not 0.3, the third would be 1.8 times too high, and twice that rate diverged.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from slmjax.config import Evaluation, Experiment, override
from slmjax.data.recipe import load_recipe
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.models.flops import parameter_count
from slmjax.nn.initial import Normal
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Linear
from slmjax.sweeps.cells import Cell, Sweep, flops_a_token, tagged, tokens
from slmjax.sweeps.isoflop import LlamaShape, at_budget, isoflop
from slmjax.sweeps.making import seeds

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {
    3e10: (8, 16, 24, 32, 48),
    1e11: (8, 16, 24, 40, 56),
    3e11: (16, 24, 32, 48, 72),
    1e12: (24, 32, 48, 64, 96),
}
"""By budget; the middle one is expected to be best, from 40 to 60 tokens a parameter"""
BUDGETS = tuple(WIDTHS)
HELD_OUT, HELD_OUT_WIDTH = 6e12, 72
PEAK_LR = 0.032
"""At the smallest budget"""
LENGTH, BATCH = 128, 8
SHAPE = LlamaShape(vocab=264, context=LENGTH, layers=2, head_dim=8)


def adapted(experiment: Experiment) -> Experiment:
    """With initial values that suit the width, a warm-up over as many tokens as the model has parameters, at most a
    fifth of the run, and the learning rate of the budget."""
    model = replace(experiment.model, initial=Normal(std=experiment.model.width**-0.5))
    budget = flops_a_token(experiment) * tokens(experiment)
    warmup = min(round(parameter_count(model) / (LENGTH * BATCH)), experiment.steps // 5)
    schedule = Linear(peak_lr=PEAK_LR * (budget / BUDGETS[0]) ** -0.3, warmup_steps=max(1, warmup))
    return replace(experiment, model=model, schedule=schedule)


def base() -> Experiment:
    classics = load_recipe(ROOT / "data/recipes/english_classics.py")
    text = replace(classics, name="english_bytes_10", tokenizer=Bytes(), validation=0.1)
    return Experiment(
        name="chinchilla-cpu",
        model=SHAPE.wide(16),
        data=PackedText(train=(Part(source=text),), length=LENGTH, batch=BATCH),
        schedule=Linear(peak_lr=1e-2),
        optimizer=AdamW(b2=0.99, weight_decay=0.1),
        steps=100,
        evaluation=Evaluation(every=1_000_000, batches=512),  # after the last step only
    )


def sweep() -> Sweep:
    cells = isoflop(base(), BUDGETS, WIDTHS, SHAPE.wide, adapted)
    middle = [cells[5 * i + 2] for i in range(len(BUDGETS))]
    largest = adapted(at_budget(replace(base(), model=SHAPE.wide(HELD_OUT_WIDTH)), HELD_OUT))
    held_out = Cell(experiment=largest, tags={"budget": HELD_OUT})
    return Sweep(name="chinchilla-cpu", cells=(*cells, *seeds(middle, 2, first=1)), held_out=held_out)


def learning_rates() -> Sweep:
    """The learning rate of the rule, times 1/4 to 4, for the middle width of three budgets."""
    middle = isoflop(base(), BUDGETS, {c: widths[2:3] for c, widths in WIDTHS.items()}, SHAPE.wide, adapted)
    middle = (middle[0], *middle[2:])
    cells = []
    for cell in middle:
        peak: Any = cell.experiment.schedule
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            experiment = override(cell.experiment, "schedule.peak_lr", factor * peak.peak_lr)
            cells.append(tagged(cell, experiment, factor=factor))
    return Sweep(name="chinchilla-cpu-lr", cells=tuple(cells))
