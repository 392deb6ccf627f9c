"""An encoder of half the layers, width and heads of its teacher, which learns nothing but the relations between the
teacher's queries, keys and values in the last layer. Wang et al. 2021 (MiniLMv2), arXiv:2012.15828.

    slmjax train experiments/pretrain/encoder.py --runtime.workdir runs/encoder
    slmjax train experiments/distill/minilm.py --runtime.workdir runs/minilm

Measured once, in short: 200 steps of the teacher (`--schedule.warmup-steps 20`) and 100 of the student
(`--schedule.warmup-steps 10`), both with `--data.batch 8 --data.length 64
--evaluation.every 100 --runtime.dtype float32`. The student's steps
took 80 seconds on 2 cores that other programs kept busy. The divergence of the relations falls from 0.584 to 0.052 nats
(validation: 0.048). Its output layer learns nothing (validation loss 8.26, that of chance: log 4096 = 8.32): fine-tune
it, by `start=FromModel(model="runs/minilm")`. Runs of the length that the files have were not measured.
"""

from dataclasses import replace

from slmjax.config import Experiment
from slmjax.distill.objective import Distill
from slmjax.distill.recipes import minilm2
from slmjax.experiment_file import load_experiment
from slmjax.models.families.bert import bert
from slmjax.objectives import MaskedLM

TEACHER = "runs/encoder"


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/encoder.py")
    return replace(
        base,
        name="minilm",
        model=bert(layers=2, width=128, heads=2, hidden=512, vocab=4096, context=128),
        objective=Distill(teachers=(TEACHER,), match=0.0, cross_entropy=0.0, task=MaskedLM(), terms=minilm2(heads=8)),
        steps=600,
    )
