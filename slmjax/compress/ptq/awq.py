"""AWQ: input channels with large activations are scaled up before rounding, and large weights are clipped.

Errors are those of outputs on calibration data, computed from the Gram matrix of the inputs: the sum over tokens of
|(W' - W) x|^2 is the trace of (W' - W) X^T X (W' - W)^T.

References:
    Lin et al. 2023, arXiv:2306.00978
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.ptq.rtn import Scale, shrunk, usual
from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.grids import encode, rounded
from slmjax.compress.quant.quantizers import Quantizer

POWERS = tuple(i / 20 for i in range(21))
"""Exponents of the channels' mean |x| that are tried; 0 scales nothing"""
SHRINKS = tuple(1 - i / 20 for i in range(11))
"""Factors on the usual scale that are tried when weights are clipped"""


class Matrix(NamedTuple):
    """A matrix to be rounded."""

    quantizer: Quantizer
    w: np.ndarray  # float32 [out, in]
    group: int | None  # input channels that share a scale; None: all

    @property
    def blocks(self) -> Blocks:
        """Of the matrix as [out, groups, in]."""
        rows, columns = self.w.shape
        size = self.group or columns
        return Blocks((rows, columns), (rows, columns // size, size), (2,))


def factors(sizes: np.ndarray, power: float) -> np.ndarray:
    """sizes^power, float32 [in], divided by the geometric mean of the largest and the smallest.

    Args:
        sizes: the mean |x| of each input channel.
    """
    s = np.maximum(np.asarray(sizes, np.float64) ** power, 1e-4)
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)


def best_factors(
    matrices: Sequence[Matrix], gram: np.ndarray, sizes: np.ndarray, spread: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The factors [C] on input channels with which rounding changes the outputs of these matrices least; 1 if none is
    better.

    Args:
        matrices: all read the same input.
        gram: X^T X [in, in] of it.
        sizes: mean |x| of the C channels that have factors of their own.
        spread: factors [C] -> [in].
    """
    normed = _normed(gram)

    def error(s: np.ndarray) -> float:
        return sum(float(_error(m.quantizer, m.w, normed, spread(s), m.blocks)) for m in matrices)

    tried = [factors(sizes, power) for power in POWERS]
    return tried[int(np.argmin([error(s) for s in tried]))]


def clipped(matrix: Matrix, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """One matrix -> (codes int16 [out, in], steps [out, groups], zero points [out, groups] or None).

    Each block gets the scale with the least output error of that block alone; an output channel whose whole error is
    not smaller with these scales keeps the usual ones.

    Args:
        gram: X^T X [in, in] of its inputs.
    """
    codes, steps, zeros = _clipped(matrix.quantizer, jnp.asarray(matrix.w), _normed(gram), matrix.blocks)
    return np.asarray(codes), np.asarray(steps), None if zeros is None else np.asarray(zeros)


def _normed(gram: np.ndarray) -> Any:
    """The matrix in float32, divided by its trace."""
    return jnp.asarray(gram / max(np.trace(gram), 1e-30), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _error(quantizer: Quantizer, w: Any, gram: Any, s: Any, blocks: Blocks) -> Any:
    scaled = (w * s).reshape(blocks.blocked)
    scale = usual(quantizer, scaled, blocks)
    values = rounded(quantizer.grid, scaled, scale.step, scale.zero, blocks.over)
    return jnp.sum(_of_rows(values.reshape(w.shape) / s - w, gram))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _clipped(quantizer: Quantizer, w: Any, gram: Any, blocks: Blocks) -> Any:
    blocked, (_, groups, size) = w.reshape(blocks.blocked), blocks.blocked
    start, at = usual(quantizer, blocked, blocks), jnp.arange(groups)
    inside = gram.reshape(groups, size, groups, size)[at, :, at]  # [groups, size, size]

    def values(scale: Scale) -> Any:
        return rounded(quantizer.grid, blocked, scale.step, scale.zero, blocks.over)

    def of_blocks(factor: Any) -> Any:
        d = values(shrunk(quantizer, blocked, blocks, start, factor)) - blocked
        return jnp.sum(jnp.einsum("ogs,gst->ogt", d, inside, precision="highest") * d, axis=2, keepdims=True)

    tried = jnp.asarray(SHRINKS, jnp.float32)
    best = tried[jnp.argmin(jax.lax.map(of_blocks, tried), axis=0)]
    found = shrunk(quantizer, blocked, blocks, start, best)
    errors = [_of_rows(values(scale).reshape(w.shape) - w, gram) for scale in (found, start)]
    better = (errors[0] < errors[1])[:, None, None]
    step, zero = jax.tree.map(lambda a, b: jnp.where(better, a, b), tuple(found), tuple(start))
    return encode(quantizer.grid, w, step, zero, blocks)


def _of_rows(d: Any, gram: Any) -> Any:
    """The output error of each output channel, [out]."""
    return jnp.sum(jnp.matmul(d, gram, precision="highest") * d, axis=1)
