"""Rounding to nearest, with the quantizer's own scale or one with the least squared error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.grids import Codes, encode, rounded
from slmjax.compress.quant.quantizers import Quantizer

SHRINKS = tuple(1 - i / 64 for i in range(48))
"""Factors on the usual scale that are tried, down to 0.27"""


class Scale(NamedTuple):
    """Of shape `Blocks.broadcast`."""

    step: Any
    zero: Any  # None for a symmetric grid


Search = Callable[[Quantizer, Any, Blocks], Scale]
"""(quantizer, blocked weights, blocks) -> scale"""


def usual(quantizer: Quantizer, w: Any, blocks: Blocks) -> Scale:
    """The scale that the quantizer has when training begins."""
    own = jnp.zeros(blocks.scales, jnp.float32) if quantizer.learned else None
    reference = quantizer.reference(w, blocks) if quantizer.learned else None
    step = quantizer.step(w, blocks, own, reference)
    return Scale(step, quantizer.zero(w, step, blocks))


def shrunk(quantizer: Quantizer, w: Any, blocks: Blocks, usual: Scale, factor: Any) -> Scale:
    """The usual scale times a factor: weights beyond its values are clipped. `factor` broadcasts against the scale."""
    step = quantizer.store(usual.step * factor, blocks)
    return Scale(step, quantizer.zero(w * factor, step, blocks))


def least_error(quantizer: Quantizer, w: Any, blocks: Blocks, importance: Any = None) -> Scale:
    """Of the usual scale and smaller ones (`SHRINKS`), that with the least squared error of each block's weights.

    Args:
        importance: weight of each squared error, of the blocked shape; None: all alike.
    """
    start = usual(quantizer, w, blocks)

    def error(factor: Any) -> Any:
        scale = shrunk(quantizer, w, blocks, start, factor)
        squared = jnp.square(rounded(quantizer.grid, w, scale.step, scale.zero, blocks.over) - w)
        return jnp.sum(squared if importance is None else squared * importance, axis=blocks.over, keepdims=True)

    errors = jax.lax.map(error, jnp.asarray(SHRINKS, jnp.float32))
    return shrunk(quantizer, w, blocks, start, jnp.asarray(SHRINKS, jnp.float32)[jnp.argmin(errors, axis=0)])


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def nearest(quantizer: Quantizer, w: Any, blocks: Blocks, search: Search = usual) -> Codes:
    """A weight -> codes of the nearest values.

    References:
        The search: Choukroun et al. 2019, arXiv:1902.06822
    """
    w = w.astype(jnp.float32)
    scale = search(quantizer, w.reshape(blocks.blocked), blocks)
    return encode(quantizer.grid, w, scale.step, scale.zero, blocks)
