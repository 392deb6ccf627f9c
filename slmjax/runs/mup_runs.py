"""Short trainings of a model at several learning rates, and the sizes of its activations: what `mup_check` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Experiment
from slmjax.models.decoder import Decoder
from slmjax.models.flops import TABLES
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics, Product
from slmjax.runs.build import pieces
from slmjax.train.state import init_state
from slmjax.train.step import make_step
from slmjax.types import Batch, Params

COMPUTE = Compute(dtype="float32", unroll=1)
"""One loop over layers: most of the time of such small trainings is that of compiling them"""
Activations = dict[str, np.ndarray]
"""Name -> float32, the layers first: the output of each product with a parameter, by the parameter's path; `embedding`
and `stream`, the residual stream before the first layer and after the last; `logits`"""


class Trained(NamedTuple):
    """The end of a training."""

    losses: np.ndarray  # float32 [steps]
    params: Params


def trainer(experiment: Experiment) -> Callable[[float, Sequence[Batch]], Trained]:
    """(learning rate, batches) -> the experiment trained on these batches with this peak. Compiled once, for all
    learning rates."""
    key = jax.random.key(experiment.seed)
    start, loss_key, view_key = (jax.random.fold_in(key, i) for i in (0, 1, 3))  # as `train.step.program` draws them
    made = pieces(experiment, COMPUTE)
    objective = experiment.objective.build(made.model)

    def init() -> Any:
        return init_state(made.model.init, made.optimizer, made.view, experiment.guard, start, view_key)

    def update(peak_lr: Any, state: Any, frozen: Any, batch: Batch) -> Any:
        parts = pieces(replace(experiment, schedule=replace(experiment.schedule, peak_lr=peak_lr)), COMPUTE)
        step = make_step(objective, parts.optimizer, parts.view, loss_key, guard=experiment.guard)
        state, metrics = step(state, frozen, batch)
        return state, metrics["loss"]

    fresh, advance = jax.jit(init), jax.jit(update, donate_argnums=1)

    def train(peak_lr: float, batches: Sequence[Batch]) -> Trained:
        state, losses = fresh(), []
        for batch in batches:
            state, loss = advance(jnp.float32(peak_lr), state, objective.frozen, batch)
            losses.append(loss)
        return Trained(np.asarray(jnp.stack(losses)) if losses else np.zeros(0, np.float32), state.params)

    return train


@dataclass(frozen=True, kw_only=True)
class Outputs(Product):
    """Products without rounding that give their outputs to `add`, layer after layer."""

    add: Callable[[str, np.ndarray], None] = field(compare=False)

    def __call__(self, path: str, equation: str, x: jax.Array, weight: jax.Array, einsum: Callable) -> jax.Array:
        y = einsum(equation, x, weight)

        def record(found: Any) -> np.ndarray:
            self.add(path, np.asarray(found, np.float32))
            return np.zeros((), np.float32)

        # As in `runs.calibrating`: what is returned is added to y, so that the layers call one after another.
        return y + jax.pure_callback(record, jax.ShapeDtypeStruct((), np.float32), y).astype(y.dtype)


def activations(model: Decoder) -> Callable[[Params, Batch], Activations]:
    """(parameters, batch) -> the activations of this model. Compiled once."""
    found: dict[str, list[np.ndarray]] = {}

    def add(path: str, y: np.ndarray) -> None:
        if path not in TABLES:  # the logits come with their multiplier
            found.setdefault(path, []).append(y)

    run = model.build(COMPUTE, Numerics(product=Outputs(add=add)))

    @jax.jit
    def forward(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = run.apply(params, batch.tokens, batch.positions, batch.segment_ids, collect=True)
        return out.blocks, run.unembed(params, out.hidden)

    def measure(params: Params, batch: Batch) -> Activations:
        found.clear()
        blocks, logits = jax.block_until_ready(forward(params, batch))
        named = {path: np.stack(of_layers) for path, of_layers in found.items()}
        return {
            "embedding": np.asarray(blocks)[:1],
            **named,
            "stream": np.asarray(blocks)[-1:],
            "logits": np.asarray(logits)[None],
        }

    return measure
