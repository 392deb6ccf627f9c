"""A student of 0.9 million parameters with a tokenizer of 4,096 ids learns from a teacher that has another one (ULD).

    slmjax import SmolLM2-135M-Instruct --out runs/smollm2
    slmjax data build data/recipes/english_classics.py --out runs/data/english_classics
    slmjax train experiments/distill/across.py --runtime.workdir runs/across

Boizard et al. 2024, arXiv:2402.12030. The teacher is any decoder with its tokenizer, such as the 135 million parameters
of SmolLM2 (the folder of a download). It reads the same text in its own tokens; the two are compared where a token of
each ends at the same byte, and the log says how many do (`aligned`). What the student gains has not been measured.
"""

from dataclasses import replace

from slmjax.config import Experiment
from slmjax.data.retokenized import Retokenized
from slmjax.data.spec import Part
from slmjax.distill.across import DistillAcross
from slmjax.experiment_file import load_experiment

STORE, TEACHER = "runs/data/english_classics", "runs/smollm2"


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/distill/student.py")
    extra = Retokenized(data=STORE, other=TEACHER, length=320)
    data = replace(base.data, train=(Part(source=STORE),), extra=extra)
    return replace(base, name="across", data=data, objective=DistillAcross(teacher=TEACHER))
