"""A small sentiment classifier, distilled from a larger one on film reviews: an eighth of its width.

    slmjax train experiments/finetune/sentiment.py --runtime.workdir runs/sentiment
    slmjax train experiments/distill/small_sentiment.py --runtime.workdir runs/small-sentiment
    slmjax train experiments/distill/small_sentiment.py:alone --runtime.workdir runs/small-sentiment-alone
    slmjax report runs/small-sentiment runs/small-sentiment-alone --out comparison.html

Hinton et al. 2015, arXiv:1503.02531: half of the loss is the label's cross-entropy, half the divergence from the
teacher's two probabilities at T = 2. `alone` is the same model without a teacher. The first run downloads the reviews
(data/recipes/movie_reviews.py). What the teacher brings has not been measured yet.
"""

from dataclasses import replace

from slmjax.config import Experiment
from slmjax.distill.objective import Distill
from slmjax.experiment_file import load_experiment
from slmjax.models.families.bert import bert
from slmjax.nn.heads import Classifier
from slmjax.objectives import Classify

TEACHER = "runs/sentiment"


def alone() -> Experiment:
    base, _ = load_experiment("experiments/finetune/sentiment.py")
    head = Classifier(labels=base.model.labels)
    small = bert(layers=1, width=16, heads=2, hidden=32, vocab=base.model.vocab, context=256, head=head)
    return replace(base, name="small-sentiment-alone", model=small)


def experiment() -> Experiment:
    return replace(alone(), name="small-sentiment", objective=Distill(teachers=(TEACHER,), task=Classify()))
