"""A BERT of 4.3 million parameters on 10 MB of English classics, from scratch. Devlin et al. 2019, arXiv:1810.04805.

    slmjax train experiments/pretrain/encoder.py --runtime.workdir runs/encoder
    slmjax export runs/encoder --out exports/encoder

TOKENS
"""

from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.spec import Data, Part
from slmjax.models.bert import bert
from slmjax.objectives import MaskedLM
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD

CORPUS = Path(__file__).resolve().parents[2] / "data/recipes/english_classics_masked.py"


def experiment() -> Experiment:
    return Experiment(
        name="encoder",
        model=bert(layers=4, width=256, heads=4, hidden=1024, vocab=4096, context=128),
        data=Data(train=(Part(source=str(CORPUS)),), length=128, batch=32),
        objective=MaskedLM(),
        optimizer=AdamW(weight_decay=0.01),
        schedule=WSD(peak_lr=1e-3, warmup_steps=100, decay_fraction=0.3),
        steps=1000,
        evaluation=Evaluation(every=200, batches=8),
    )
