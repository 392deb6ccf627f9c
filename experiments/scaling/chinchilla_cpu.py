"""A scaling law on two cores: 44 runs of models of 4 to 250 thousand parameters, and a larger one that is predicted.

    slmjax sweep plan experiments/scaling/chinchilla_cpu.py --out runs/chinchilla
    slmjax sweep run runs/chinchilla
    slmjax sweep report runs/chinchilla

Four budgets of compute, five widths each around the one that is expected to be best, three seeds of every width at the
two small budgets and of the middle one at the others, and a held-out run of six times the largest budget, whose loss is
predicted before it runs. Every run reads 10 MB of English classics as bytes at most once, and is evaluated on the same
half million bytes. Every model has two layers.

The recipe scales with the budget: the batch grows with its square root, from one sequence at the smallest, so that each
budget makes 500 to 11,000 steps, and the learning rate is the same for all. With 8 sequences everywhere the best rate
falls with the power 0.3 of the budget, the smallest one ends 8% higher, and its seeds differ by 2%. `learning_rates` is
a sweep of the rate. The law is the coupled one: why, and what was predicted, is in docs/scaling.md.

Initial values have a standard deviation of 1 / sqrt(width): the usual 0.02 is far too little for a width of 16. Those
of matrices whose product is added to the residual stream are zero: at the smallest budget that is worth 1.9%.
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
HELD_OUT, HELD_OUT_WIDTH = 6e12, 88
PEAK_LR = 0.011
LENGTH = 128
SHAPE = LlamaShape(vocab=264, context=LENGTH, layers=2, head_dim=8)


def adapted(experiment: Experiment) -> Experiment:
    """The same budget by this file's recipe: batch, initial values that suit the width, and a warm-up over as many
    tokens as the model has parameters, at most a fifth of the run."""
    budget = flops_a_token(experiment) * tokens(experiment)
    batch: Any = override(experiment, "data.batch", max(1, round((budget / BUDGETS[0]) ** 0.5)))
    made = at_budget(batch, budget)
    warmup = min(round(parameter_count(made.model) * made.steps / tokens(made)), made.steps // 5)
    return replace(
        made,
        model=replace(made.model, initial=Normal(std=made.model.width**-0.5, residual=0.0)),
        schedule=Linear(peak_lr=PEAK_LR, warmup_steps=max(1, warmup)),
    )


def base() -> Experiment:
    classics = load_recipe(ROOT / "data/recipes/english_classics.py")
    text = replace(classics, name="english_bytes_10", tokenizer=Bytes(), validation=0.1)
    return Experiment(
        name="chinchilla-cpu",
        model=SHAPE.wide(16),
        data=PackedText(train=(Part(source=text),), length=LENGTH, batch=8),
        schedule=Linear(peak_lr=1e-2),
        optimizer=AdamW(b2=0.99, weight_decay=0.1),
        steps=100,
        evaluation=Evaluation(every=1_000_000, batches=512),  # after the last step only
    )


def sweep() -> Sweep:
    cells = isoflop(base(), BUDGETS, WIDTHS, SHAPE.wide, adapted)
    again = [*cells[:10], cells[12], cells[17]]
    largest = adapted(at_budget(replace(base(), model=SHAPE.wide(HELD_OUT_WIDTH)), HELD_OUT))
    held_out = Cell(experiment=largest, tags={"budget": HELD_OUT})
    return Sweep(name="chinchilla-cpu", cells=(*cells, *seeds(again, 2, first=1)), held_out=held_out, coupled=True)


def learning_rates() -> Sweep:
    """The learning rate times 1/2 to 2, for the middle width of three budgets."""
    middle = isoflop(base(), BUDGETS, {c: widths[2:3] for c, widths in WIDTHS.items()}, SHAPE.wide, adapted)
    cells = []
    for cell in (middle[0], *middle[2:]):
        for factor in (0.5, 1.0, 2.0):
            experiment = override(cell.experiment, "schedule.peak_lr", factor * PEAK_LR)
            cells.append(tagged(cell, experiment, factor=factor))
    return Sweep(name="chinchilla-cpu-lr", cells=tuple(cells))
