"""Sums over the processes of a run: whether any is to stop or save, and a hash of the rows that all have read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

HALF = 24
"""Bits of a number that are added at a time: sums over 256 processes fit 32 bits"""


def make_consensus(mesh: jax.sharding.Mesh) -> Callable[[Sequence[bool], int], Any]:
    """Makes the function (flags, a number below 2^48) of this process -> their sums over all processes, an array for
    `read` that may still be computed.

    It is dispatched with the step and read with its metrics, one step late, so that no process waits for it. With one
    process there is nothing to sum.
    """
    if jax.process_count() == 1:
        return lambda flags, number: _pack(flags, number)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    local = len(mesh.local_devices)
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))

    def sums(flags: Sequence[bool], number: int) -> Any:
        rows = np.zeros((local, len(flags) + 2), np.uint32)  # a row a device: this process counts on its first one
        rows[0] = _pack(flags, number)
        return total(jax.make_array_from_process_local_data(sharding, rows))

    return sums


def read(agreed: Any) -> tuple[tuple[bool, ...], int]:
    """Waits for the sums -> for each flag, whether any process set it, and the sum of the numbers modulo 2^48."""
    *flags, low, high = map(int, np.asarray(agreed))
    return tuple(n > 0 for n in flags), (low + (high << HALF)) % 2 ** (2 * HALF)


def _pack(flags: Sequence[bool], number: int) -> np.ndarray:
    return np.asarray([*flags, number % 2**HALF, number >> HALF], np.uint32)
