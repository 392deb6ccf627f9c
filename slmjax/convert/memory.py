"""Moves, rounds and frees parameters array by array, so that memory never holds the model twice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.tree import map_with_path
from slmjax.types import Params


def replace_leaves(params: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Replaces each array of a nested dict by `change(array)`, one after another."""
    for key, value in params.items():
        if isinstance(value, dict):
            replace_leaves(value, change)
        else:
            params[key] = change(value)


def to_device(params: Params) -> Params:
    """Moves the numpy arrays of a nested dict to the first device, in place, so that the numpy arrays can be freed."""
    device = jax.local_devices()[0]
    replace_leaves(params, lambda x: jax.block_until_ready(jax.device_put(x, device)))
    return params


def rounded(params: Params, dtype: str, *, donate: bool, keep: Collection[str] = ()) -> Params:
    """float32 parameters rounded to `dtype` and converted back, but for the paths in `keep`. `donate`: delete each
    array once it is rounded."""

    def change(path: str, x: Any) -> Any:
        if path in keep:
            return x
        out = jax.block_until_ready(jnp.asarray(x, dtype).astype(jnp.float32))
        if donate:
            delete(x)
        return out

    return params if dtype == "float32" else map_with_path(change, params)


def delete(params: Any) -> None:
    """Frees device arrays, even if something else still refers to them."""
    for x in jax.tree.leaves(params):
        if isinstance(x, jax.Array) and not x.is_deleted():
            x.delete()


def bits(x: Any) -> np.ndarray:
    """The bytes of an array; copies only if it is not contiguous in memory."""
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)
