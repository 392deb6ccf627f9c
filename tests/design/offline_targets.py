"""Targets of a teacher that were written before: for each token, the likeliest that follow, with their probabilities.

slmjax train tests/design/offline_targets.py --data.extra.targets runs/targets.npz --runtime.workdir runs/taught
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Experiment
from slmjax.data.extra import Extra
from slmjax.experiment_file import load_experiment
from slmjax.losses.pieces import weighted_means
from slmjax.objectives import ObjectiveSpec
from slmjax.types import Objective


@dataclass(frozen=True, kw_only=True)
class Taught(Extra):
    """`ids` int32 and `probs` float32, both [B, T, k], of a teacher that sees one token: its file has them by token."""

    targets: str = "runs/targets.npz"

    def __call__(self, batch):
        with np.load(self.targets) as table:
            return {name: table[name][batch.tokens] for name in ("ids", "probs")}

    def identity(self):  # what the file holds decides the numbers, not where it lies
        return hashlib.sha256(Path(self.targets).read_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SparseTargets(ObjectiveSpec):
    """-sum over the teacher's k tokens of its probability times the student's log-probability, nats a token."""

    def build(self, model) -> Objective:
        def per_token(logits, teacher):
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), teacher["ids"], axis=-1)
            return {"loss": -jnp.sum(teacher["probs"] * log_probs, axis=-1)}

        def loss(params, frozen, b, key):
            hidden = model.apply(params, b.tokens, b.positions, b.segment_ids).hidden
            return weighted_means(per_token, model.unembed, params, hidden, b.extra, b.weights, factors={"loss": 1.0})

        return Objective(loss=loss)


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="taught", data=replace(base.data, extra=Taught()), objective=SparseTargets())
