"""Expected speed of a training step, and time and power of a run, from two seconds of matrix products."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.axes import STACKED
from slmjax.config import Experiment
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.track.progress import duration

EFFICIENCY = {"cpu": 0.6, "gpu": 0.5, "tpu": 0.6}
"""FLOP/s of a whole step as a fraction of those of its matrix products alone: attention, norms, the loss and the
optimizer take the rest. Of the order measured for the experiments of this repository; yours may differ by a third"""
WORTH_TELLING = 3e12
"""FLOPs of the shortest run whose time is estimated before it begins: half a minute on a laptop"""
MOST_TOKENS = 2048
"""Tokens in a calibration product: more are not faster"""
WATTS = {"h200": 700.0, "h100": 700.0, "a100": 400.0, "l40s": 350.0, "l4": 72.0, "v100": 300.0, "tpu": 200.0}
"""Board power by device kind (lower case, contained), from the manufacturers' data sheets; TPU: an assumption"""


class Speed(NamedTuple):
    """Measured speed, and how much of it a step is expected to reach."""

    flops: float
    """FLOP/s of the model's matrix products, on all devices together"""
    efficiency: float
    """The fraction of `flops` that a step is expected to reach"""

    def tokens_per_second(self, flops_per_token: float) -> float:
        return self.flops * self.efficiency / flops_per_token


def products(decoder: Assembly) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix of one layer of each kind, and of the head."""
    axes = tree.flatten(decoder.axes(), is_leaf=tree.is_axes)
    head = decoder.logit_products()
    shapes = [(head // decoder.vocab, decoder.vocab)] if head else []
    for path, shape in tree.flatten(decoder.declared()).items():
        names, sizes = axes[path.removesuffix("/value")], shape.shape
        if names[0] != "layers" or len(names) < 3 or path.removesuffix("/value").endswith("bias"):
            continue
        if names[1] in STACKED:  # one matrix of many
            names, sizes = names[1:], sizes[1:]
        cut = 2 if names[1] == "embed" else len(sizes) - 1
        shapes.append((math.prod(sizes[1:cut]), math.prod(sizes[cut:])))
    return shapes


def calibrate(decoder: Assembly, dtype: str, tokens: int, seconds: float = 2.0) -> Speed:
    """Times products of the model's shapes, one forward and two backward each, on the first device."""
    rows = min(tokens, MOST_TOKENS)
    shapes = products(decoder)
    weights = [jnp.full(shape, 0.01, dtype) for shape in shapes]
    inputs = [jnp.full((rows, n), 0.01, dtype) for n, _ in shapes]

    def backward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y, pull = jax.vjp(jnp.matmul, x, w)
        return y, pull(y)

    run = jax.jit(lambda xs, ws: [backward(x, w) for x, w in zip(xs, ws, strict=True)])
    jax.block_until_ready(run(inputs, weights))
    best, end = math.inf, time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        jax.block_until_ready(run(inputs, weights))
        best = min(best, time.perf_counter() - start)
    once = sum(6 * rows * n * m for n, m in shapes)
    backend = jax.default_backend()
    devices = 1 if backend == "cpu" else jax.device_count()  # simulated devices share the cores
    return Speed(flops=once / best * devices, efficiency=EFFICIENCY.get(backend, 0.5))


def about_time(experiment: Experiment, compute: Compute, flops_per_token: float) -> str:
    """`; about 3 min to train` from a third of a second of products, or nothing for a run of seconds."""
    tokens = experiment.steps * experiment.data.batch * experiment.data.length
    if tokens * flops_per_token < WORTH_TELLING:
        return ""
    speed = calibrate(experiment.model, compute.dtype, experiment.data.batch * experiment.data.length, seconds=0.3)
    return f"; about {duration(tokens / speed.tokens_per_second(flops_per_token))} to train, evaluation left out"


def watts() -> tuple[float, str]:
    """Estimated watts of all devices while training, and where the figure is from."""
    import os

    from slmjax.track.energy import watts_per_thread

    if jax.default_backend() == "cpu":
        each, source = watts_per_thread()
        threads = os.cpu_count() or 1
        return each * threads, f"{threads} threads; {source}"
    kind = jax.devices()[0].device_kind.lower()
    each = next((w for name, w in WATTS.items() if name in kind), 300.0)
    return each * jax.device_count(), f"{jax.device_count()} x {each:g} W board power of {kind}"
