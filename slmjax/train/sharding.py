"""Where arrays live: a mesh, rules from logical axes to mesh axes, and the placements that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax import tree
from slmjax.errors import UserError
from slmjax.types import Batch

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
"""The rows of a batch are split over both, since fsdp is data parallelism whose parameters are split too"""

RULES: Mapping[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}
"""Logical axis -> mesh axis. What is not named is replicated."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each way of being parallel; -1 takes what the others leave."""

    data: int = -1
    """Copies of the model that split the batch"""
    fsdp: int = 1
    """Splits the batch, and parameters and optimizer state as well. Rajbhandari et al. 2020, arXiv:1910.02054"""
    tensor: int = 1
    """Splits heads, hidden units and vocabulary. Shoeybi et al. 2019, arXiv:1909.08053"""

    def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (all of them by default).

        Raises:
            UserError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        said = f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}"
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise UserError(f"{said}: each size is at least 1, and at most one of them is -1 (the rest of the devices)")
        known = math.prod(n for n in sizes if n > 0)
        if len(devices) % known or (-1 not in sizes and known != len(devices)):
            raise UserError(f"{said} does not fit {len(devices)} device(s): the sizes must multiply to that number")
        shape = tuple(len(devices) // known if n == -1 else n for n in sizes)
        auto = (jax.sharding.AxisType.Auto,) * len(AXES)  # jax.make_mesh defaults to Explicit from 0.12 on
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: jax.sharding.Mesh, rules: Mapping[str, str]) -> P:
    """The placement of one array.

    A dimension that the mesh axis does not divide (3 key-value heads over 2 devices) is replicated, as is a second
    dimension that asks for a mesh axis already taken.
    """
    taken: set[str] = set()
    out: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        to = rules.get(name) if name else None
        if to is None or to in taken or size % mesh.shape[to]:
            to = None
        else:
            taken.add(to)
        out.append(to)
    return P(*out)


def is_axes(x: Any) -> bool:
    """Whether x is one parameter's tuple of logical axes."""
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def shardings(params: Any, axes: Any, mesh: jax.sharding.Mesh, rules: Mapping[str, str] = RULES) -> Any:
    """The placement of each parameter (arrays or abstract), as a tree of `NamedSharding`."""
    flat = tree.flatten(axes, is_leaf=is_axes)
    return tree.map_with_path(lambda path, x: NamedSharding(mesh, spec(flat[path], x.shape, mesh, rules)), params)


def replicated(params: Any, axes: Any, mesh: jax.sharding.Mesh, rules: Mapping[str, str] = RULES) -> dict[str, str]:
    """{path: why} of the parameters that a rule would split, were their size divisible. Worth a line in the log."""
    flat = tree.flatten(axes, is_leaf=is_axes)
    return {
        path: f"{name}={size} is not divisible by {rules[name]}={mesh.shape[rules[name]]}"
        for path, x in tree.flatten(params).items()
        for name, size in zip(flat[path], x.shape, strict=True)
        if name in rules and size % mesh.shape[rules[name]]
    }


def mirror(state: Any, params: Any, placed: Any, mesh: jax.sharding.Mesh) -> Any:
    """Placements of a state (optimizer or view) that holds copies of the parameters somewhere inside.

    A leaf whose path ends with a parameter's path and that has its shape (a momentum, an average) lies where the
    parameter lies. Everything else (counters, factored moments) is small and replicated.
    """
    where = {
        path: (x.shape, s) for (path, x), s in zip(tree.flatten(params).items(), jax.tree.leaves(placed), strict=True)
    }

    def place(path: str, leaf: Any) -> NamedSharding:
        keys = path.split("/")
        for i in range(len(keys)):
            shape, sharding = where.get("/".join(keys[i:]), (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, P())

    return tree.map_with_path(place, state)


def gathered(params: Any, axes: Any, mesh: jax.sharding.Mesh, rules: Mapping[str, str] = RULES) -> Callable[[Any], Any]:
    """A function that brings parameters together from the `fsdp` axis, for use inside jit.

    Left to itself the partitioner often moves activations to the pieces of the parameters instead, which costs far
    more (and a gather from an embedding table split by width is replicated as a whole).
    """
    if mesh.shape["fsdp"] == 1:
        return lambda effective: effective
    whole = shardings(params, axes, mesh, {name: to for name, to in rules.items() if to != "fsdp"})
    return lambda effective: jax.lax.with_sharding_constraint(effective, mirror(effective, params, whole, mesh))


def ways(mesh: Mapping[str, int]) -> int:
    """Over how many devices a mesh of these sizes splits the rows of a batch."""
    return mesh["data"] * mesh["fsdp"]


def put(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This process's rows of a batch [B / processes, T] -> the global batch [B, T] on the mesh.

    Raises:
        UserError: the rows cannot be split evenly.
    """
    rows, split = batch.tokens.shape[0] * jax.process_count(), ways(mesh.shape)
    if rows % split:
        raise UserError(f"batch {rows} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}")
    sharding = NamedSharding(mesh, ROWS)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    here = {str(index) for index in sharding.addressable_devices_indices_map((rows,)).values()}
    if len(here) * jax.process_count() != split:  # two processes would feed the same rows, each with its own data
        raise UserError(
            f"mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']} tensor={mesh.shape['tensor']} splits rows over "
            f"{split} of {mesh.size} devices in {jax.process_count()} processes; keep tensor within a process"
        )
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
