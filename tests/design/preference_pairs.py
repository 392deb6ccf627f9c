"""Preference pairs: both answers of a pair are one row, so that no cut into micro-batches parts them.

slmjax train tests/design/preference_pairs.py --runtime.workdir runs/preferred
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Experiment
from slmjax.data.extra import Extra
from slmjax.experiment_file import load_experiment
from slmjax.losses.pieces import token_values
from slmjax.objectives import ObjectiveSpec
from slmjax.types import Objective


@dataclass(frozen=True, kw_only=True)
class Reversed(Extra):
    """The rejected answer, `rejected` int32 [B, T]: the words of the row in the opposite order."""

    def __call__(self, batch):
        real = batch.segment_ids > 0  # padding stands at the end of a row
        back = np.clip(real.sum(1, keepdims=True) - 1 - np.arange(real.shape[1]), 0, None)
        return {"rejected": np.where(real, np.take_along_axis(batch.tokens, back, axis=1), batch.tokens)}


@dataclass(frozen=True, kw_only=True)
class Prefer(ObjectiveSpec):
    """-log sigmoid(beta * (log p(chosen) - log p(rejected)) / tokens): SimPO, Meng et al. 2024, arXiv:2405.14734."""

    beta: float = 2.0

    def build(self, model) -> Objective:
        def per_token(logits, targets):
            return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

        def loss(params, frozen, b, key):
            real = jnp.float32(b.weights.sum(1) > 0)  # [B]

            def mean(tokens, targets):  # [B, T] -> log p a token, [B]
                hidden = model.apply(params, tokens, b.positions, b.segment_ids).hidden
                values = token_values(per_token, model.unembed, params, hidden, targets, b.weights)
                return jnp.sum(values * b.weights, axis=1) / jnp.maximum(b.weights.sum(1), 1.0)

            rejected = b.extra["rejected"]
            margin = self.beta * (mean(b.tokens, b.targets) - mean(rejected, jnp.roll(rejected, -1, axis=1)))
            pairs = {"loss": -jax.nn.log_sigmoid(margin), "accuracy": jnp.float32(margin > 0)}
            means = {name: jnp.sum(x * real) / jnp.maximum(real.sum(), 1.0) for name, x in pairs.items()}
            return means["loss"], {**means, "weight": real.sum()}

        return Objective(loss=loss)


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="preferred", data=replace(base.data, extra=Reversed()), objective=Prefer())
