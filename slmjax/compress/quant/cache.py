"""A key-value cache in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.numerics import Cache, put, take


@dataclass(frozen=True, kw_only=True)
class RoundedCache(Cache):
    """Keys and values as integers with a float16 scale for each token and head: [B, G, S, K] codes (two in a byte, if 4
    bits) and [B, G, S, 1] scales."""

    bits: int = 8

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise UserError(f"numerics.cache.bits is {self.bits}; expected 8 or 4")

    def init(self, batch: int, heads: int, length: int, width: int, dtype: str) -> Any:
        if self.bits == 4 and width % 2:
            raise UserError(f"numerics.cache.bits is 4, but a head has {width} channels and two share a byte; use 8")
        codes = jnp.zeros((batch, heads, length, width * self.bits // 8), jnp.int8)
        return {"codes": codes, "scales": jnp.zeros((batch, heads, length, 1), jnp.float16)}

    def write(self, stack: Any, new: jax.Array, depth: jax.Array, start: jax.Array) -> Any:
        x = new.swapaxes(1, 2).astype(jnp.float32)  # [B, G, T, K]
        most = 2 ** (self.bits - 1) - 1
        # as in a file: rounded to float16 before it divides, so that reading finds the nearest value
        scales = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most).clip(2.0**-14).astype(jnp.float16)
        codes = jnp.clip(jnp.round(x / scales.astype(jnp.float32)), -most, most).astype(jnp.int8)
        codes = codes if self.bits == 8 else pairs(codes)
        return {"codes": put(stack["codes"], codes, depth, start), "scales": put(stack["scales"], scales, depth, start)}

    def read(self, stack: Any, depth: jax.Array, dtype: Any) -> jax.Array:
        codes, scales = take(stack["codes"], depth), take(stack["scales"], depth)
        codes = codes if self.bits == 8 else apart(codes)
        return (codes.astype(jnp.float32) * scales.astype(jnp.float32)).swapaxes(1, 2).astype(dtype)


def pairs(codes: jax.Array) -> jax.Array:
    """int8 in [-8, 7], [..., K] -> [..., K / 2]: the first half in the low four bits, the second in the high ones."""
    low, high = jnp.split(codes, 2, axis=-1)
    return (high << 4) | (low & 15)


def apart(packed: jax.Array) -> jax.Array:
    """The inverse of `pairs`."""
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis=-1)
