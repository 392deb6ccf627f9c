"""Pruning after training, one matrix at a time, from what its inputs were like in some text.

Functions of a matrix w [out, in] and the Gram matrix of its inputs, X^T X [in, in], for inputs X [tokens, in]. A factor
on the Gram matrix (a mean instead of a sum) changes nothing. They compute in float64, in numpy.

`sparsity` is the share of weights that become zero. With `m`, of every m consecutive input channels of an output
channel the same number does: 2:4 is `sparsity=0.5, m=4`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from slmjax.compress.prune.masks import NOfM, check_sparsity
from slmjax.errors import UserError

Matrix = np.ndarray


class Pruned(NamedTuple):
    """A pruned matrix."""

    weights: Matrix
    """[out, in], zero where pruned; of the dtype of what was pruned"""
    keep: Matrix
    """bool [out, in]: False where pruned"""


def magnitude(w: Matrix, sparsity: float, *, m: int | None = None) -> Pruned:
    """Prunes the smallest weights of the matrix. Han et al. 2015, arXiv:1506.02626.

    Raises:
        UserError: the sparsity is not possible.
    """
    _check(w, None, sparsity, m)
    scores = np.abs(np.asarray(w, np.float64))
    sets = scores.reshape(1, -1) if m is None else scores.reshape(-1, m)
    return _masked(w, ~_lowest(sets, round(sparsity * sets.shape[1])).reshape(w.shape))


def wanda(w: Matrix, gram: Matrix, sparsity: float, *, m: int | None = None) -> Pruned:
    """Prunes, of each output channel, the weights with the smallest |w_ij| ||X_j||. Sun et al. 2024, arXiv:2306.11695.

    Raises:
        UserError: the sparsity is not possible, or the Gram matrix does not fit.
    """
    _check(w, gram, sparsity, m)
    norms = np.sqrt(np.diag(gram).astype(np.float64))
    scores = np.abs(np.asarray(w, np.float64)) * norms
    sets = scores if m is None else scores.reshape(-1, m)
    return _masked(w, ~_lowest(sets, round(sparsity * sets.shape[1])).reshape(w.shape))


def sparsegpt(
    w: Matrix, gram: Matrix, sparsity: float, *, m: int | None = None, block: int = 128, damping: float = 0.01
) -> Pruned:
    """Prunes column by column, and changes the weights of later columns to make up for the error.

    With H the damped Gram matrix and U^T U = H^-1, U upper triangular, pruning w_ij costs w_ij^2 / U_jj^2 once columns
    before j are final; it is made up for by subtracting w_ij / U_jj * U_jk from each later w_ik. Weights are chosen
    when their block of columns (their m columns, with `m`) is reached, by that cost, among all rows. Columns of inputs
    that are always 0 become zero.

    Args:
        block: columns.
        damping: what is added to the diagonal of H, as a share of its mean.

    Raises:
        UserError: the sparsity is not possible, or the Gram matrix does not fit or cannot be inverted.

    References:
        Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1
    """
    _check(w, gram, sparsity, m)
    if m is not None and block % m:
        raise UserError(f"block is {block}; expected a multiple of m = {m}, such as {32 * m}")
    dead = np.diag(gram) == 0
    u = _inverse_factor(gram, dead, damping)
    columns = np.array(np.asarray(w).T, np.float64, order="C")  # [in, out]: a column of w is contiguous
    columns[dead] = 0.0
    inputs, rows = columns.shape
    keep = np.ones(columns.shape, bool)
    scale = np.square(np.diag(u))[:, None]
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        part, factor, errors = columns[first:last], u[first:last, first:last], np.empty((last - first, rows))
        if m is None:
            # Rounded so that the numbers of all blocks add up to that of the matrix.
            count = round(sparsity * rows * last) - round(sparsity * rows * first)
            costs = (np.square(part) / scale[first:last]).reshape(1, -1)
            keep[first:last] = ~_lowest(costs, count).reshape(part.shape)
        for j in range(last - first):
            if m is not None and j % m == 0:
                costs = np.square(part[j : j + m]) / scale[first + j : first + j + m]
                keep[first + j : first + j + m] = ~_lowest(costs.T, round(sparsity * m)).T
            errors[j] = np.where(keep[first + j], 0.0, part[j]) / factor[j, j]
            part[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
        columns[last:] -= u[first:last, last:].T @ errors
    keep[dead] = False
    columns[~keep] = 0.0
    return Pruned(np.ascontiguousarray(columns.T).astype(w.dtype), np.ascontiguousarray(keep.T))


def output_error(w: Matrix, new: Matrix, gram: Matrix) -> float:
    """||X w^T - X new^T||^2: how much the outputs have changed, summed over tokens and output channels."""
    change = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return float(np.sum((change @ np.asarray(gram, np.float64)) * change))


def _inverse_factor(gram: Matrix, dead: Matrix, damping: float) -> Matrix:
    """U upper triangular with U^T U = H^-1."""
    h = np.array(gram, np.float64)
    mean = np.mean(np.diag(h)[~dead]) if not dead.all() else 1.0
    h[np.diag_indices_from(h)] += damping * mean
    h[dead, dead] = mean  # nothing else is in their rows and columns
    try:
        # H = R R^T with R upper triangular, the Cholesky factor of H read backwards; then U = R^-1.
        backwards = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise UserError(f"damping is {damping}, too little for this Gram matrix to be inverted; try 0.1") from error
    return solve_triangular(backwards, np.eye(len(h)))


def _lowest(scores: Matrix, count: int) -> Matrix:
    """[R, n] -> bool [R, n]: the `count` lowest of each row; of equal ones the first."""
    pruned = np.zeros(scores.shape, bool)
    order = np.argsort(scores, axis=1, kind="stable")
    np.put_along_axis(pruned, order[:, :count], True, axis=1)
    return pruned


def _masked(w: Matrix, keep: Matrix) -> Pruned:
    return Pruned(np.where(keep, w, np.zeros((), w.dtype)), keep)


def _check(w: Matrix, gram: Matrix | None, sparsity: float, m: int | None) -> None:
    check_sparsity("sparsity", sparsity)
    inputs = w.shape[1]
    if m is not None:
        NOfM(m=m).check(sparsity)
        if inputs % m:
            raise UserError(f"m is {m}, which does not divide the {inputs} input channels of this matrix")
    if gram is not None and gram.shape != (inputs, inputs):
        raise UserError(f"the Gram matrix has the shape {gram.shape}; expected {(inputs, inputs)}, the inputs of w")
    if gram is not None and not np.isfinite(gram).all():
        raise UserError("the Gram matrix has entries that are not finite: collect it in float32, on inputs that are")
