"""GPTQ: columns are rounded one after another, and the columns still to come make up for the error. All columns of a
matrix are one compiled program.

References:
    Frantar et al. 2023, arXiv:2210.17323
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.ptq.rtn import Scale, Search, least_error, usual
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
    with jax.enable_x64(True):  # errors add up over columns
        codes, steps, zeros = _columns(quantizer, search, group, jnp.asarray(w.T), jnp.asarray(upper))
        codes, steps, zeros = np.asarray(codes), np.asarray(steps), None if zeros is None else np.asarray(zeros)
    return codes.T, steps.T, None if zeros is None else zeros.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _columns(
    quantizer: Quantizer, search: Search, group: int | None, w: jax.Array, upper: jax.Array
) -> tuple[Any, Any, Any]:
    """`gptq` in one program, on arrays whose first axis is that of the columns: w [in, out] and the factor, float64."""
    columns, rows = w.shape
    size, block = group or columns, min(BLOCK, columns)
    padded = -(-columns // block) * block
    w = jnp.pad(w, ((0, padded - columns), (0, 0)))
    upper = jnp.pad(upper, (0, padded - columns)) + jnp.diag(jnp.where(jnp.arange(padded) < columns, 0.0, 1.0))
    of_group, of_column = (Blocks((rows, n), (rows, n), (1,)) for n in (size, 1))

    most = None
    if quantizer.of_matrix:
        blocks = Blocks((rows, columns), (rows, columns // size, size), (2,))
        most = jnp.max(usual(quantizer, w[:columns].T.reshape(blocks.blocked).astype(jnp.float32), blocks).step)

    def scale_of(chunk: jax.Array) -> Scale:  # [size, out]
        found = search(quantizer, chunk.T.astype(jnp.float32), of_group)
        if most is not None:  # of the whole matrix, whose unit follows from it
            steps = jnp.concatenate([jnp.minimum(found.step, most), most[None, None]])
            found = found._replace(step=quantizer.store(steps, of_group)[:-1])
        return Scale(*(None if x is None else x.astype(jnp.float32) for x in found))

    def of_block(i: jax.Array, state: tuple) -> tuple:
        w, codes, scale, scales = state
        first = i * block
        factors = jax.lax.dynamic_slice(upper, (first, 0), (block, padded))
        square = jax.lax.dynamic_slice(factors, (0, first), (block, block))

        def column(j: jax.Array, state: tuple) -> tuple:
            part, errors, codes, scale, scales = state
            at = first + j
            if size < columns:
                # what later columns of this group will still gain from this block's errors is not known yet
                def found() -> Scale:
                    now = jax.lax.dynamic_update_slice(w, part, (first, 0))
                    return scale_of(jax.lax.dynamic_slice(now, (at, 0), (size, rows)))

                scale = jax.lax.cond(at % size == 0, found, lambda: scale)
            scales = jax.tree.map(
                lambda all, x: jax.lax.dynamic_update_slice(all, x.T, (at // size, 0)), scales, tuple(scale)
            )
            x = part[j]
            rounding = quantizer.grid, x.astype(jnp.float32)[:, None], scale.step, scale.zero
            value = rounded(*rounding, of_column.over)[:, 0]
            codes = jax.lax.dynamic_update_slice(codes, encode(*rounding, of_column).codes.T, (at, 0))
            error = (x - value) / square[j, j]
            return part - square[j][:, None] * error, errors.at[j].set(error), codes, scale, scales

        part = jax.lax.dynamic_slice(w, (first, 0), (block, rows))
        _, errors, *rest = jax.lax.fori_loop(0, block, column, (part, jnp.zeros_like(part), codes, scale, scales))
        return w - factors.T @ errors, *rest

    scale = scale_of(w[:size])
    scales = jax.tree.map(lambda x: jnp.zeros((-(-padded // size), rows), x.dtype), tuple(scale))
    empty = jnp.zeros((padded, rows), jnp.int16)
    _, codes, _, (steps, zeros) = jax.lax.fori_loop(0, padded // block, of_block, (w, empty, scale, scales))
    groups = columns // size
    return codes[:columns], steps[:groups], None if zeros is None else zeros[:groups]
