"""Parameters moved, rounded and freed array by array, so that a model is never held twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.types import Params


def replace_leaves(params: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Puts `change(array)` in the place of each array of a nested dict, one after another."""
    for key, value in params.items():
        if isinstance(value, dict):
            replace_leaves(value, change)
        else:
            params[key] = change(value)


def to_device(params: Params) -> Params:
    """Arrays of a nested dict of numpy arrays, moved to the first device in place; the numpy arrays can then go."""
    device = jax.local_devices()[0]
    replace_leaves(params, lambda x: jax.block_until_ready(jax.device_put(x, device)))
    return params


def rounded(params: Params, dtype: str, *, donate: bool) -> Params:
    """float32 parameters that have been through `dtype`. `donate` deletes each array once it is rounded."""

    def change(x: Any) -> Any:
        out = jax.block_until_ready(jnp.asarray(x, dtype).astype(jnp.float32))
        if donate:
            delete(x)
        return out

    return params if dtype == "float32" else jax.tree.map(change, params)


def delete(params: Any) -> None:
    """Frees device arrays, whoever else refers to them."""
    for x in jax.tree.leaves(params):
        if isinstance(x, jax.Array) and not x.is_deleted():
            x.delete()


def bits(x: Any) -> np.ndarray:
    """The bytes of an array, without a copy where it lies in memory as it should."""
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)
