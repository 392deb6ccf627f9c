"""Peak memory of a training step from its trace alone: nothing is compiled, nothing runs.

The step's jaxpr says which arrays live when. Arrays are walked in program order; the peak is looked for where XLA has
to have its operands in memory (matrix products, reductions, loops, gathers), since elementwise work between those is
fused. So whatever changes what a step keeps (remat, chunked loss, accumulation, a new layer) changes the estimate,
without a formula of its own. XLA may order things better and use buffers twice, or copy and pad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.config import Experiment
from slmjax.data.spec import Data
from slmjax.nn.compute import Compute
from slmjax.runs.build import pieces
from slmjax.train import micro, stored
from slmjax.train.sharding import Layout
from slmjax.train.state import init_state
from slmjax.types import Batch

FUSED = frozenset(
    """
    add add_any sub mul div neg exp log log1p expm1 tanh logistic sqrt rsqrt square integer_pow pow sign abs max min
    select_n eq ne lt le gt ge and or not xor convert_element_type broadcast_in_dim iota reshape squeeze expand_dims
    stop_gradient copy erf clamp is_finite rem floor round slice pad rev sin cos transpose reduce_precision
    optimization_barrier
    """.split()  # noqa: SIM905
)
"""Primitives that XLA fuses into the operation that reads them"""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the worst moment of a step."""

    params: float
    optimizer: float
    """State of the optimizer and the view"""
    gradients: float
    activations: float
    """What the forward pass keeps for the backward pass, and the work on top of it"""

    @property
    def total(self) -> float:
        return self.params + self.optimizer + self.gradients + self.activations


def estimate(
    experiment: Experiment,
    compute: Compute,
    mesh: Mapping[str, int],
    layout: Layout = Layout(),  # noqa: B008
) -> Memory:
    """
    Args:
        mesh: the sizes of its axes.
    """
    parts = pieces(experiment, compute)
    view, objective = parts.view, experiment.objective.build(parts.model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init_state(parts.model.init, parts.optimizer, view, experiment.guard, key), key)
    axes = tree.flatten(stored.join(parts.model.axes, view.axes), is_leaf=tree.is_axes)
    trained = stored.trained(state.params, view.frozen)

    def on_one_device(params: Any) -> float:
        """Bytes of these parameters on one device."""
        return sum(x.size * x.dtype.itemsize / layout.split(axes[path], x.shape, mesh)
                   for path, x in tree.flatten(params).items())  # fmt: skip

    n = micro_batches(experiment, compute, mesh, layout)
    rows = math.ceil(experiment.data.batch / n / layout.ways(mesh))
    batch = jax.eval_shape(objective.prepare, batch_of(experiment.data, rows), key)

    def loss(trained: Any, params: Any, frozen: Any, view_state: Any, batch: Batch, key: Any) -> Any:
        whole = stored.parts(stored.complete(trained, params, view.frozen))
        return objective.loss(view.apply(*whole, view_state), frozen, batch, key)

    frozen = jax.eval_shape(lambda: objective.frozen)
    trace = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(
        trained, state.params, frozen, state.view, batch, key
    )
    working = peak(trace.jaxpr) - tree.nbytes(trained)  # the trace's outputs are the gradients
    share = on_one_device(state.params) / tree.nbytes(state.params)
    return Memory(
        params=on_one_device(state.params) + tree.nbytes(objective.frozen),
        optimizer=(tree.nbytes(state.opt) + tree.nbytes(state.view)) * share,
        gradients=(2 if n > 1 else 1) * on_one_device(trained),
        activations=max(0.0, working) / mesh["tensor"] + tree.nbytes(batch),
    )


def micro_batches(
    experiment: Experiment,
    compute: Compute,
    mesh: Mapping[str, int],
    layout: Layout = Layout(),  # noqa: B008
) -> int:
    """Micro-batches of a training step."""
    data = experiment.data
    least, tokens = experiment.accumulate, compute.micro_tokens(experiment.model.width)
    return micro.count(data.batch, data.length, ways=layout.ways(mesh), least=least, tokens=tokens)


def device_memory() -> tuple[float, str]:
    """Bytes that a device may use, and where the figure is from."""
    import psutil

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"]), jax.local_devices()[0].device_kind
    return float(psutil.virtual_memory().total), "memory of this machine"


def batch_of(data: Data, rows: int) -> Batch:
    """A batch of this many rows, as shapes and dtypes."""
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, data.empty(rows)))


def peak(jaxpr: Any) -> float:
    """The most bytes that arrays computed inside `jaxpr` take at one time; its inputs are not counted."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not _literal(v)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not _literal(v)}
    live: dict[Any, float] = {}
    now = most = 0.0
    for i, eqn in enumerate(jaxpr.eqns):
        results = {v: _size(v) for v in eqn.outvars if v in last}
        inner = max((peak(sub) for sub in _subs(eqn)), default=0.0)
        outputs = sum(results.values())
        if inner or eqn.primitive.name not in FUSED:
            loop = eqn.primitive.name in ("scan", "while")
            most = max(most, now + (outputs + inner if loop else max(outputs, inner)))
        live |= results
        now += outputs
        for v in {v for v in eqn.invars if not _literal(v) and last[v] == i} & live.keys():
            now -= live.pop(v)
    return max(most, now)


def _subs(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [getattr(x, "jaxpr", x) for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _size(v: Any) -> float:
    shape, dtype = getattr(v.aval, "shape", ()), getattr(v.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 4)


def _literal(v: Any) -> bool:
    return hasattr(v, "val")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One setting that makes an experiment fit."""

    setting: str
    """As given on the command line"""
    cost: str
    memory: Memory


def one_change(
    experiment: Experiment,
    compute: Compute,
    mesh: Mapping[str, int],
    limit: float,
    layout: Layout = Layout(),  # noqa: B008
) -> Change | None:
    """The mildest single setting under which the step fits into `limit` bytes a device, or None.

    In order: more micro-batches (no change of results), fsdp over the same devices, remat (slower), bfloat16
    activations, then a smaller batch (which changes the experiment).
    """
    from slmjax.nn.compute import Remat

    devices = layout.ways(mesh)
    batch, most = experiment.data.batch, experiment.data.batch // devices
    candidates: list[tuple[str, str, Experiment, Compute, Mapping[str, int]]] = [
        (f"--accumulate {n}", "same results, a little slower", replace(experiment, accumulate=n), compute, mesh)
        for n in range(experiment.accumulate + 1, most + 1)
        if batch % n == 0 and (batch // n) % devices == 0
    ]
    if mesh["data"] > 1:
        split = {**mesh, "data": 1, "fsdp": devices}
        setting = f"--runtime.mesh.data 1 --runtime.mesh.fsdp {devices}"
        candidates.append((setting, "same results, more communication", experiment, compute, split))
    if not isinstance(compute.remat, Remat):
        slower = "same results, up to a third slower"
        candidates.append(
            ("runtime.compute.remat = Remat()", slower, experiment, replace(compute, remat=Remat()), mesh)
        )
    for n in sorted({batch // d for d in range(2, batch + 1) if batch % d == 0 and (batch // d) % devices == 0})[::-1]:
        smaller = replace(
            experiment, data=replace(experiment.data, batch=n), accumulate=math.gcd(experiment.accumulate, n)
        )
        candidates.append((f"--data.batch {n}", "another experiment: retune the learning rate", smaller, compute, mesh))
    for setting, cost, changed, how, where in candidates:
        memory = estimate(changed, how, where, layout)
        if memory.total <= limit:
            return Change(setting=setting, cost=cost, memory=memory)
    return None
