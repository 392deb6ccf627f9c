"""What no process knows alone: whether one was told to stop or save, and which rows all of them have read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

HALF = 24
"""Bits of a number that are added at a time: 256 processes do not overflow 32"""


def make_consensus(mesh: jax.sharding.Mesh) -> Callable[[Sequence[bool], int], Any]:
    """(flags, a number below 2^48) of this process -> their sums over all processes, as an array still being computed,
    for `read`.

    It is dispatched with the step and read with its metrics, one step late, so that no process waits for it. One
    process has nobody to ask.
    """
    if jax.process_count() == 1:
        return lambda flags, number: _pack(flags, number)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    local = len(mesh.local_devices)
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))

    def ask(flags: Sequence[bool], number: int) -> Any:
        mine = np.zeros((local, len(flags) + 2), np.uint32)  # counted once, on the first device of this process
        mine[0] = _pack(flags, number)
        return total(jax.make_array_from_process_local_data(sharding, mine))

    return ask


def read(agreed: Any) -> tuple[tuple[bool, ...], int]:
    """Waits for it -> the flags that any process raises, and the sum of the numbers modulo 2^48."""
    *flags, low, high = map(int, np.asarray(agreed))
    return tuple(n > 0 for n in flags), (low + (high << HALF)) % 2 ** (2 * HALF)


def _pack(flags: Sequence[bool], number: int) -> np.ndarray:
    return np.asarray([*flags, number % 2**HALF, number >> HALF], np.uint32)
