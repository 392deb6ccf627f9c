"""Knowledge distillation in one file: a small model learns from the logits of a frozen, trained one.

slmjax train experiments/pretrain/quickstart.py --runtime.workdir runs/teacher
slmjax train tests/design/distilled.py --objective.teacher runs/teacher --runtime.workdir runs/student
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from slmjax.config import Experiment
from slmjax.experiment_file import load_config, load_experiment
from slmjax.models.families.llama import llama
from slmjax.objectives import ObjectiveSpec
from slmjax.serialise import from_json
from slmjax.train.checkpoint_folder import restore_params
from slmjax.types import Model, Objective


@dataclass(frozen=True, kw_only=True)
class MatchLogits(ObjectiveSpec):
    """T^2 * KL(teacher || student), nats a token. Hinton et al. 2015, arXiv:1503.02531."""

    teacher: str
    """A run folder"""
    temperature: float = 2.0

    def build(self, model: Model) -> Objective:
        teacher = from_json(load_config(Path(self.teacher) / "config.json")["experiment"]["model"]).build()

        def log_probs(m, params, batch):
            hidden = m.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
            return jax.nn.log_softmax(m.unembed(params, hidden) / self.temperature)

        def loss(params, frozen, batch, key):
            student, target = log_probs(model, params, batch), log_probs(teacher, frozen, batch)
            weight = batch.weights.sum()
            kl = (jnp.exp(target) * (target - student)).sum(-1)
            mean = self.temperature**2 * (kl * batch.weights).sum() / jnp.maximum(weight, 1.0)
            return mean, {"loss": mean, "weight": weight}

        return Objective(loss=loss, frozen=restore_params(Path(self.teacher) / "checkpoints"))


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    student = llama(layers=2, width=128, heads=4, kv_heads=2, hidden=352, vocab=4096, context=256, tied=True)
    return replace(base, name="student", model=student, objective=MatchLogits(teacher="runs/teacher"))
