"""Matrix products with parameters on a CPU, whose gradients stay in bfloat16.

XLA's CPU back end multiplies bfloat16 matrices by AVX512-BF16 or AMX instructions only where the left side is
contracted over its last axis, and converts to float32 otherwise: every weight gradient, x^T g, then runs at a third of
the speed. So here x^T is first stored as an array.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp

ROWS = 512
"""Rows of one piece of a transposed matrix"""


def cpu_einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, weight)`, faster on a CPU for a weight used as a plain matrix (`btd,dhk->bthk`,
    `...d,vd->...v`), with the same gradient up to rounding."""
    split = matrix_form(equation)
    if split is None:
        return jnp.einsum(equation, x, weight)
    contracted, first = split
    leading = x.shape[: x.ndim - contracted]
    inner = math.prod(x.shape[x.ndim - contracted :])
    outer = weight.shape[contracted:] if first else weight.shape[: weight.ndim - contracted]
    flat = weight.reshape((inner, -1) if first else (-1, inner))
    return _product(first, x.reshape(-1, inner), flat).reshape(*leading, *outer)


@functools.cache
def matrix_form(equation: str) -> tuple[int, bool] | None:
    """How many of x's last axes are contracted, and whether they are the first axes of the weight (else its last).
    None: the equation is not a plain matrix product."""
    parsed = re.fullmatch(r"(\.\.\.)?(\w*),(\w+)->(\.\.\.)?(\w*)", equation.replace(" ", ""))
    if parsed is None or bool(parsed[1]) != bool(parsed[4]):
        return None
    x, weight, out = parsed[2], parsed[3], parsed[5]
    inner = [axis for axis in x if axis in weight]
    contracted, leading = "".join(inner), "".join(axis for axis in x if axis not in weight)
    outer = "".join(axis for axis in weight if axis not in inner)
    if not inner or x != leading + contracted or out != leading + outer:
        return None
    if weight not in (contracted + outer, outer + contracted):
        return None
    return len(inner), weight == contracted + outer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(first: bool, x: jax.Array, weight: jax.Array) -> jax.Array:  # [N, C], [C, O] or [O, C] -> [N, O]
    return _dot(x, weight, 0 if first else 1)


def _forward(first: bool, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(first, x, weight), (x, weight)


def _backward(first: bool, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    left, right = (x, g) if first else (g, x)
    dx = _dot(g, weight, 1 if first else 0)
    if left.shape[1] <= right.shape[1]:
        return dx, _dot(transpose(left), right, 0)
    # The narrower side is cheaper to transpose; the optimization barrier keeps XLA from folding the last transpose into
    # the product.
    return dx, jax.lax.optimization_barrier(_dot(transpose(right), left, 0)).T


_product.defvjp(_forward, _backward)


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())))


def transpose(x: jax.Array) -> jax.Array:
    """x [..., N, C] -> [..., C, N], as an array that XLA does not fold into the product that reads it.

    It is concatenated from pieces: XLA would fold a single transpose into the product and compute that in float32.
    """
    rows = x.shape[-2]
    pieces = max(2, math.ceil(rows / ROWS))
    bounds = [rows * i // pieces for i in range(1, pieces)]
    return jnp.concatenate([jnp.swapaxes(piece, -1, -2) for piece in jnp.split(x, bounds, axis=-2)], axis=-1)
