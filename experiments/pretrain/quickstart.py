"""A Llama-style model of 4 million parameters on 10 MB of English classics, from scratch.

    make quickstart
    slmjax train experiments/pretrain/quickstart.py --runtime.workdir runs/quickstart

0.7 million tokens, 0.23 epochs: short enough for 2 cores without bfloat16 instructions. Expected validation loss: 4.7
nats a token. With --steps 500 --data.batch 16, 2 million tokens, it is 4.1; there a peak of 3e-3 gave 4.15, one of
4e-3, at the edge of stability, 4.5.
"""

from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD

CORPUS = Path(__file__).resolve().parents[2] / "data/recipes/english_classics.py"


def experiment() -> Experiment:
    return Experiment(
        name="quickstart",
        model=llama(layers=4, width=256, heads=4, kv_heads=2, hidden=704, vocab=4096, context=256, tied=True),
        data=PackedText(train=(Part(source=str(CORPUS)),), length=256, batch=8),
        optimizer=AdamW(weight_decay=0.1),
        schedule=WSD(peak_lr=2e-3, warmup_steps=30, decay_fraction=0.3),
        steps=350,
        evaluation=Evaluation(every=100, batches=8),
    )
