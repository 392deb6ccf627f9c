"""What one process was told and all must do at the same step: stop, or save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def make_consensus(mesh: jax.sharding.Mesh) -> Callable[[Sequence[bool]], Any]:
    """flags of this process -> the flags that any process raises, as a bool array still being computed.

    It is dispatched with the step and read with its metrics, one step late, so that no process waits for it. One
    process has nobody to ask.
    """
    if jax.process_count() == 1:
        return lambda flags: np.asarray(flags)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    local = len(mesh.local_devices)
    anyone = jax.jit(lambda x: x.any(axis=0), out_shardings=NamedSharding(mesh, P()))

    def ask(flags: Sequence[bool]) -> Any:
        mine = np.tile(np.asarray(flags), (local, 1))
        return anyone(jax.make_array_from_process_local_data(sharding, mine))

    return ask
