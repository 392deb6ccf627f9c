"""A model, objective, data and tracker as small as they can be: train/ knows no family, so its tests need none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slmjax.train import step
from slmjax.train.guard import Skip
from slmjax.train.sharding import Mesh
from slmjax.types import Batch, Objective, Optimizer, ParamView

V, D, F, B, T = 16, 8, 24, 8, 12
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {"mlp": {"up": ("embed", "mlp"), "down": ("mlp", "embed")}},
    "final_norm": {"scale": ("embed",)},
}
SPIKE = 10 * T
"""A position that makes the toy's loss a hundred times as large"""


def init(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "embed": {"table": jax.random.normal(a, (V, D))},
        "layers": {"mlp": {"up": jax.random.normal(b, (D, F)) / D**0.5, "down": jax.random.normal(c, (F, D)) / F**0.5}},
        "final_norm": {"scale": jnp.ones(D)},
    }


def loss(params, frozen, batch, key):
    x = params["embed"]["table"][batch.tokens]
    x = x + jax.nn.silu(x @ params["layers"]["mlp"]["up"]) @ params["layers"]["mlp"]["down"]
    logits = (x * params["final_norm"]["scale"]) @ params["embed"]["table"].T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    weight = batch.weights.sum()
    mean = (nll * batch.weights).sum() / jnp.maximum(weight, 1)
    mean = mean * jnp.where(batch.positions.max() == SPIKE, 100.0, 1.0)
    return mean, {"loss": mean, "weight": weight}


OBJECTIVE = Objective(loss)
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
OPTIMIZER = Optimizer(ADAMW.init, ADAMW.update, lambda state, params: params)
EMA = ParamView(
    init=lambda params, key: ({}, jax.tree.map(jnp.copy, params)),
    apply=lambda params, own, average: params,
    update=lambda average, params, own, step: jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params),
    evaluate=lambda params, own, average: average,
)


def program(mesh=Mesh(), devices=None, **changed):  # noqa: B008
    devices = jax.devices()[:1] if devices is None else devices
    arguments = {"objective": OBJECTIVE, "optimizer": OPTIMIZER, "view": EMA, "guard": Skip()} | changed
    return step.program(init, AXES, mesh=mesh.build(devices), **arguments)


def batch(index, rows=B):
    """Different every time, with an uneven number of masked tokens in each row."""
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, V, (rows, T + 1), dtype=np.int32)
    weights = (np.arange(T) < rng.integers(1, T + 1, (rows, 1))).astype(np.float32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)).copy()
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, np.ones((rows, T), np.int32))


class Data:
    """Batch 0, 1, 2, ...; those in `nan` hold a NaN, those in `spikes` a loss out of all proportion."""

    def __init__(self, nan=(), spikes=(), on_next=lambda index: None):
        self.next, self.nan, self.spikes, self.on_next = 0, nan, spikes, on_next

    def __next__(self):
        out = batch(self.next)
        if self.next in self.nan:
            out.weights[0, 0] = math.nan
        if self.next in self.spikes:
            out.positions[0, 0] = SPIKE
        self.on_next(self.next)
        self.next += 1
        return out

    def state(self):
        return {"next": self.next, "epoch": self.next / 10}

    def restore(self, state):
        self.next = state["next"]


class Tracker:
    """Rows by step, as metrics.jsonl would hold them after a resume."""

    def __init__(self):
        self.rows, self.resumed, self.artifacts, self.status = {}, [], [], None

    def log(self, step, metrics):
        assert step not in self.rows, f"step {step} logged twice"
        self.rows[step] = metrics

    def resume(self, step):
        self.resumed.append(step)
        self.rows = {s: row for s, row in self.rows.items() if s <= step}

    def artifact(self, path, kind, metadata):
        self.artifacts.append((path, kind, metadata))

    def state(self):
        return {"id": "toy"}

    def finish(self, status):
        assert self.status is None
        self.status = status
