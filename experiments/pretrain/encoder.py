"""A BERT of 4.3 million parameters on 10 MB of English classics, from scratch. Devlin et al. 2019, arXiv:1810.04805.

    slmjax train experiments/pretrain/encoder.py --runtime.workdir runs/encoder
    slmjax export runs/encoder --out exports/encoder

2.5 million tokens, 0.78 epochs. Measured once, on 2 cores of an AMD EPYC that other programs kept busy: 11 minutes,
5,400 tokens a second (median; 11,100 at best). Expected validation loss: 5.81 nats a masked token. How often each token
occurs, and nothing else, gives 6.43; masked tokens take longer to learn than next ones, and this run is short.
"""

from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.bert import bert
from slmjax.objectives import MaskedLM
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD

CORPUS = Path(__file__).resolve().parents[2] / "data/recipes/english_classics_masked.py"


def experiment() -> Experiment:
    return Experiment(
        name="encoder",
        model=bert(layers=4, width=256, heads=4, hidden=1024, vocab=4096, context=128),
        data=PackedText(train=(Part(source=str(CORPUS)),), length=128, batch=16),
        objective=MaskedLM(),
        optimizer=AdamW(weight_decay=0.01),
        schedule=WSD(peak_lr=4e-4, warmup_steps=100, decay_fraction=0.3),
        steps=1200,
        evaluation=Evaluation(every=200, batches=8),
    )
