"""Little text: four models that differ in their seed, read several times over it with a high weight decay, and one
model of the same size that learns from all four (arXiv:2509.14786).

    for seed in 0 1 2 3; do
        slmjax train experiments/distill/ensemble.py:member --runtime.workdir runs/member-$seed \\
            --seed $seed --data.seed $seed
    done
    slmjax train experiments/distill/ensemble.py --runtime.workdir runs/of-four
    slmjax report runs/of-four runs/member-0 runs/member-1 runs/member-2 runs/member-3 --out comparison.html

The text is Moby-Dick in bytes, 1.2 MB, which a run of 3000 steps of 1024 bytes reads 2.8 times. The paper's weight
decay is about 30 times the usual one; here 1.0. Over seeds: `experiments/distill/pays.py --only 5`.
"""

from dataclasses import replace
from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.recipe import Recipe, load_recipe
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.distill.objective import Distill
from slmjax.models.families.llama import llama
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD

MEMBERS = tuple(f"runs/member-{seed}" for seed in range(4))
CLASSICS = Path(__file__).resolve().parents[2] / "data/recipes/english_classics.py"
WEIGHT_DECAY = 1.0


def one_book() -> Recipe:
    """Moby-Dick, a tenth of its chapters held out."""
    books = load_recipe(CLASSICS)
    book = tuple(source for source in books.sources if source.name == "Moby-Dick")
    return replace(books, name="moby_dick_bytes", sources=book, tokenizer=Bytes(), validation=0.1)


def member() -> Experiment:
    return Experiment(
        name="member",
        model=llama(layers=2, width=64, heads=2, kv_heads=2, hidden=160, vocab=264, context=128, tied=True),
        data=PackedText(train=(Part(source=one_book()),), length=128, batch=8),
        optimizer=AdamW(weight_decay=WEIGHT_DECAY),
        schedule=WSD(peak_lr=4e-3, warmup_steps=50, decay_fraction=0.3),
        steps=3000,
        evaluation=Evaluation(every=500, batches=16),
    )


def experiment() -> Experiment:
    """The four are averaged: their probabilities, not their logits."""
    taught = Distill(teachers=MEMBERS, match=1.0, cross_entropy=0.0, temperature=1.0)
    return replace(member(), name="of-four", objective=taught)
