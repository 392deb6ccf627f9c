"""GPTQ: columns are rounded one after another, and the columns still to come make up for the error.

References:
    Frantar et al. 2023, arXiv:2210.17323
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.ptq.rtn import Scale, Search, least_error
from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.grids import encode, rounded
from slmjax.compress.quant.quantizers import Quantizer

BLOCK = 128
"""Columns that are rounded before the columns after them are updated"""


def factor(gram: np.ndarray, damping: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """The upper Cholesky factor U of the inverse Hessian (H = X^T X plus `damping` times its mean diagonal; U^T U =
    H^-1), and which inputs were always zero.

    Args:
        gram: X^T X [in, in], of the inputs of a product.
    """
    h = np.array(gram, np.float64)
    dead = np.diag(h) <= 0
    h[dead, dead] = 1.0
    h[np.diag_indices_from(h)] += damping * np.mean(np.diag(h))
    inverse = np.linalg.inv(h)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T, dead


def gptq(
    quantizer: Quantizer, w: np.ndarray, gram: np.ndarray, group: int | None, search: Search = least_error
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """One matrix -> (codes int16 [out, in], steps [out, groups], zero points [out, groups] or None).

    Args:
        w: float [out, in].
        gram: X^T X [in, in] of the inputs on calibration data.
        group: input channels that share a scale, whose scale is found when its first column is reached; None: one scale
            for all of an output channel.
    """
    upper, dead = factor(gram)
    w = np.where(dead[None], 0.0, np.asarray(w, np.float64))
    rows, columns = w.shape
    size = columns if group is None else group
    of_group = Blocks((rows, size), (rows, size), (1,))
    codes = np.empty((rows, columns), np.int16)
    scales: list[Scale] = []
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = np.empty((rows, last - first))
        for column in range(first, last):
            if column % size == 0:
                # what later columns of this group will still gain from this block's errors is not known yet
                block = jnp.asarray(w[:, column : column + size], jnp.float32)
                scales.append(_scale(quantizer, block, of_group, search))
            code, value = _column(quantizer, w[:, column], scales[-1])
            codes[:, column] = code
            error = (w[:, column] - value) / upper[column, column]
            w[:, column:last] -= error[:, None] * upper[column, column:last]
            errors[:, column - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    steps = np.concatenate([np.asarray(s.step) for s in scales], axis=1)
    zeros = None if scales[0].zero is None else np.concatenate([np.asarray(s.zero) for s in scales], axis=1)
    return codes, steps, zeros


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _scale(quantizer: Quantizer, w: Any, blocks: Blocks, search: Search) -> Scale:
    return search(quantizer, w, blocks)


def _column(quantizer: Quantizer, w: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out] and values [out] of one column, by the path that all codes come from."""
    column = Blocks((len(w), 1), (len(w), 1), (1,))
    return _encoded(quantizer.grid, jnp.asarray(w[:, None], jnp.float32), scale, column)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _round(grid: Any, w: Any, scale: Scale, blocks: Blocks) -> tuple[Any, Any]:
    codes = encode(grid, w, scale.step, scale.zero, blocks).codes
    return codes[:, 0], rounded(grid, w, scale.step, scale.zero, blocks.over)[:, 0]


def _encoded(grid: Any, w: Any, scale: Scale, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    codes, values = _round(grid, w, scale, blocks)
    return np.asarray(codes), np.asarray(values, np.float64)
