"""A student of 0.9 million parameters learns from the quickstart's model of 4 million, on the same text.

    slmjax train experiments/pretrain/quickstart.py --steps 1500 --runtime.workdir runs/teacher
    slmjax train experiments/distill/student.py --runtime.workdir runs/student
    slmjax eval runs/student --teacher runs/teacher

Hinton et al. 2015, arXiv:1503.02531. It pays where the teacher has seen more text than the student will
(arXiv:2502.08606); what it gains here has not been measured yet. Several teachers are averaged:
--objective.teachers runs/teacher runs/other-teacher.
"""

from dataclasses import replace

from slmjax.config import Experiment
from slmjax.distill.objective import Distill
from slmjax.experiment_file import load_experiment
from slmjax.models.families.llama import llama


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    student = llama(layers=2, width=128, heads=4, kv_heads=2, hidden=352, vocab=4096, context=256, tied=True)
    return replace(base, name="student", model=student, objective=Distill(teachers=("runs/teacher",)))
