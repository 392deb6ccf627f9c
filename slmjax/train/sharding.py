"""Placement of arrays on devices: a mesh, a layout (rules from logical axes to mesh axes), and their shardings."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Number of devices along each axis of the mesh; -1 for one axis: all remaining devices."""

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
        names = tuple(f.name for f in dataclasses.fields(self))
        sizes = [getattr(self, name) for name in names]
        description = f"mesh {' '.join(f'{name}={n}' for name, n in zip(names, sizes, strict=True))}"
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"{description}: each size is at least 1, and at most one of them is -1 (the rest of the devices)"
            )
        given = math.prod(n for n in sizes if n > 0)
        if len(devices) % given or (-1 not in sizes and given != len(devices)):
            raise UserError(
                f"{description} does not fit {len(devices)} device(s): the sizes must multiply to that number"
            )
        shape = tuple(len(devices) // given if n == -1 else n for n in sizes)
        auto = (jax.sharding.AxisType.Auto,) * len(names)  # jax.make_mesh defaults to Explicit from 0.12 on
        return jax.make_mesh(shape, names, axis_types=auto, devices=devices)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How arrays are split over a mesh. Another layout changes results by rounding only."""

    rules: tuple[tuple[str, str], ...] = (
        ("vocab", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("experts", "tensor"),
        ("embed", "fsdp"),
    )
    """(logical axis of a parameter, mesh axis that splits it). Axes that are not named are replicated"""
    rows: tuple[str, ...] = ("data", "fsdp")
    """Mesh axes over which the rows of a batch are split: over both, since fsdp is data parallelism whose parameters
    are split too"""
    tokens: tuple[str, ...] = ()
    """Mesh axes over which the tokens of each row are split (context parallelism). It needs an attention function that
    exchanges keys and values between devices, and a loss that is not cut into pieces along the tokens"""
    gathered: str = "fsdp"
    """Mesh axis along which parameters are gathered before they are used"""

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int]) -> P:
        """The placement of one parameter on a mesh of these sizes.

        A dimension that the mesh axis does not divide (3 key-value heads over 2 devices) is replicated, as is a
        dimension whose mesh axis splits an earlier dimension already.
        """
        used: set[str] = set()
        out: list[str | None] = []
        rules = dict(self.rules)
        for name, size in zip(axes, shape, strict=True):
            to = rules.get(name) if name else None
            if to is None or to in used or size % mesh[to]:
                to = None
            else:
                used.add(to)
            out.append(to)
        return P(*out)

    def split(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int]) -> int:
        """Over how many devices a parameter is split."""
        return math.prod(mesh[to] for to in self.spec(axes, shape, mesh) if to is not None)

    def shardings(self, params: Any, axes: Any, mesh: jax.sharding.Mesh) -> Any:
        """The placement of each parameter (arrays or abstract), as a tree of `NamedSharding`."""
        flat = tree.flatten(axes, is_leaf=tree.is_axes)
        return tree.map_with_path(
            lambda path, x: NamedSharding(mesh, self.spec(flat[path], x.shape, mesh.shape)), params
        )

    def replicated(self, params: Any, axes: Any, mesh: Mapping[str, int]) -> dict[str, str]:
        """{path: reason} of the parameters that are replicated because a mesh axis does not divide their size."""
        flat, rules = tree.flatten(axes, is_leaf=tree.is_axes), dict(self.rules)
        return {
            path: f"{name}={size} is not divisible by {rules[name]}={mesh[rules[name]]}"
            for path, x in tree.flatten(params).items()
            for name, size in zip(flat[path], x.shape, strict=True)
            if name in rules and size % mesh[rules[name]]
        }

    def gather(self, params: Any, axes: Any, mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
        """A function that gathers parameters along the mesh axis `gathered`, for use inside jit.

        Without it XLA's partitioner often sends activations to the shards of the parameters instead, which costs far
        more (and it replicates a whole lookup in an embedding table that is split by width).
        """
        if mesh.shape[self.gathered] == 1:
            return lambda effective: effective
        whole_rules = tuple((name, to) for name, to in self.rules if to != self.gathered)
        whole = dataclasses.replace(self, rules=whole_rules).shardings(params, axes, mesh)
        return lambda effective: jax.lax.with_sharding_constraint(effective, mirror(effective, params, whole, mesh))

    def ways(self, mesh: Mapping[str, int]) -> int:
        """Over how many devices a mesh of these sizes splits the rows of a batch."""
        return math.prod(mesh[name] for name in self.rows)

    def batch_spec(self, x: Any, length: int) -> P:
        """The placement of an array of a batch whose rows have `length` tokens."""
        by_token = self.tokens and x.ndim > 1 and x.shape[1] == length
        return P(self.rows, self.tokens) if by_token else P(self.rows)

    def put(self, batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
        """This process's rows of a batch [B / processes, ...] -> the global batch [B, ...] on the mesh.

        Raises:
            UserError: the rows cannot be split evenly.
        """
        rows, split = batch.tokens.shape[0] * jax.process_count(), self.ways(mesh.shape)
        sizes = " ".join(f"{name}={n}" for name, n in mesh.shape.items())
        if rows % split:
            raise UserError(f"batch {rows} cannot be split over {split} devices (mesh {sizes})")
        placed = jax.tree.map(lambda x: NamedSharding(mesh, self.batch_spec(x, batch.tokens.shape[1])), batch)
        if jax.process_count() == 1:
            return jax.device_put(batch, placed)
        by_row = NamedSharding(mesh, P(self.rows))
        here = {str(index) for index in by_row.addressable_devices_indices_map((rows,)).values()}
        if len(here) * jax.process_count() != split:  # two processes would give the same rows, each with its own data
            raise UserError(
                f"mesh {sizes} splits rows over {split} of {mesh.size} devices in {jax.process_count()} processes; "
                f"keep {' and '.join(name for name in mesh.shape if name not in self.rows)} within a process"
            )
        return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, np.asarray(x)), batch, placed)


def mirror(state: Any, params: Any, placed: Any, mesh: jax.sharding.Mesh) -> Any:
    """Placements of a state (optimizer or view), some of whose leaves correspond to parameters.

    A leaf whose path ends with a parameter's path and that has its shape (a momentum, an average) is placed like the
    parameter. All others (counters, factored moments) are small and replicated.
    """
    placements = {
        path: (x.shape, s) for (path, x), s in zip(tree.flatten(params).items(), jax.tree.leaves(placed), strict=True)
    }

    def place(path: str, leaf: Any) -> NamedSharding:
        keys = path.split("/")
        for i in range(len(keys)):
            shape, sharding = placements.get("/".join(keys[i:]), (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, P())

    return tree.map_with_path(place, state)
