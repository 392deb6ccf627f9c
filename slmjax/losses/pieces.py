"""Functions of the logits, with the logits of only some positions in memory at once.

The logits [B, T, V] are often the largest array of a step. A loss is a function of each token's logits; these functions
apply it to one piece of positions after another:

- `weighted_means` (and `weighted_sums`): sums over tokens, with their gradient computed in the same pass. For
  cross-entropy, distillation, fine-tuning.
- `token_values`: a value for each token, whose gradient computes each piece again. For losses that are nonlinear in
  sums over tokens, such as a preference loss.

Distillation, with the teacher's logits computed piece by piece as well and no gradient formed for the teacher:

    def per_token(logits, inputs):
        teacher = jax.nn.log_softmax(teacher_model.unembed(frozen, inputs["teacher_hidden"]))
        return {"loss": jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)}

    return weighted_means(
        per_token, model.unembed, params, hidden, {"teacher_hidden": teacher_hidden}, batch.weights,
        factors={"loss": 1.0},
    )

Pieces are cut along T and never along B, so a batch split over devices stays where it is. Where T itself is split over
devices (context parallelism), pass `chunk=T` (or more): one piece, which every device computes for its own positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from slmjax.types import Metrics, Params

MAX_LOGITS = 2**22
"""Logits of one piece (16 MiB in float32), unless `MIN_TOKENS` needs more"""
MIN_TOKENS = 1024
"""Least tokens of one piece, so that its matrix products are large enough to be fast"""


def weighted_means(
    per_token: Callable[[jax.Array, Any], Mapping[str, jax.Array]],
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    inputs: Any,
    weights: jax.Array,  # float32 [B, T]
    *,
    factors: Mapping[str, Any],
    chunk: int | None = None,
    arrays: int = 1,
) -> tuple[jax.Array, Metrics]:
    """`weighted_sums` divided by the sum of the weights: what `Objective.loss` returns.

    Returns:
        The loss [], and metrics: each name of `per_token` as a mean over tokens, and `weight`, the sum of the weights.
        With no weight at all everything is 0.
    """
    total, sums = weighted_sums(
        per_token, unembed, params, hidden, inputs, weights, factors=factors, chunk=chunk, arrays=arrays
    )
    weight = sums["weight"]
    mean = 1.0 / jnp.where(weight == 0, 1.0, weight)
    return total * mean, {**{name: x * mean for name, x in sums.items()}, "weight": weight}


def weighted_sums(
    per_token: Callable[[jax.Array, Any], Mapping[str, jax.Array]],
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    inputs: Any,
    weights: jax.Array,  # float32 [B, T]
    *,
    factors: Mapping[str, Any],
    chunk: int | None = None,
    arrays: int = 1,
) -> tuple[jax.Array, Metrics]:
    """Sums over tokens of weight * value, and the combination of them that is minimised.

    Logits are computed once, a piece at a time. The gradient, if there is one, is computed together with the value of
    each piece (Hsu et al. 2024, arXiv:2410.10989, section 3.2), with respect to `hidden`, `inputs`, `factors`, and
    every other array that `unembed` and `per_token` use, including `params`; nothing is computed or stored for arrays
    that are not differentiated, such as a teacher's parameters. There is no gradient of `weights`. First derivatives
    in reverse mode only.

    Where the weight is 0, `hidden` and `inputs` may hold any value, infinities and nan included: `per_token` gets 1 in
    their place (integers unchanged), and neither a sum nor a gradient depends on its result there.

    Args:
        per_token: (logits [B, n, V], inputs of the same tokens) -> {name: values [B, n]}. Any differentiable function
            of each token by itself. It may compute a teacher's logits from the teacher's hidden states in `inputs`.
        unembed: (params, hidden [B, n, D]) -> logits [B, n, V].
        inputs: arrays [B, T, ...] in any pytree: targets, a teacher's hidden states or probabilities.
        factors: {name: factor}: the total is the sum of factor * sum. Names without a factor are metrics only.
        chunk: positions of each row whose logits [B, chunk, V] exist at once. None: as many as make
            B * chunk * V <= `MAX_LOGITS`, or B * chunk <= `MIN_TOKENS` tokens, at least one; a value of T or more: all.
            Where T is split over devices: T.
        arrays: about how many arrays of the logits' shape `per_token` and its gradient work on at once; with `chunk`
            None, pieces are that much smaller.

    Returns:
        The total [], which is differentiated, and {name: sum []} with `weight`, the sum of the weights, which are not.

    Raises:
        ValueError: `per_token` returns something other than one value a token, or lacks a name that has a factor.
    """
    size = _piece(unembed, params, hidden, chunk, arrays)
    tokens = (hidden, inputs, jax.lax.stop_gradient(weights))
    # Only the arrays that the values depend on become arguments, so that no gradient is kept for the others.
    values, read = jax.closure_convert(
        _masked(per_token, unembed, params, factors), *jax.tree.map(lambda x: x[:, :size], tokens)
    )
    scaled = {name: jnp.asarray(factor, weights.dtype) for name, factor in factors.items()}
    total, sums = _sums(values, size, tokens, read, scaled)
    return total, jax.lax.stop_gradient(sums)


def token_values(
    per_token: Callable[[jax.Array, Any], Any],
    unembed: Callable[[Params, Any], Any],
    params: Params,
    hidden: jax.Array,  # [B, T, D]
    inputs: Any,
    weights: jax.Array,  # float32 [B, T]
    *,
    chunk: int | None = None,
    arrays: int = 1,
) -> Any:
    """The values of `per_token` for each token, 0 where the weight is 0; they are not multiplied by the weights.

    Any function of them can be differentiated. The backward pass computes the logits again, with the memory of one
    piece (Chen et al. 2016, arXiv:1604.06174), since the factor of each token's gradient is not known in the forward
    pass. Where `weighted_sums` suffices, it needs a third fewer matrix products.

    Args: as for `weighted_sums`, but `per_token` returns one array or any pytree of them.

    Returns:
        What `per_token` returns, with arrays [B, T].

    Raises:
        ValueError: `per_token` returns something other than one value a token.
    """
    length = hidden.shape[1]
    size = _piece(unembed, params, hidden, chunk, arrays)
    whole = size == length
    # Inside a scan the compiler cannot merge the second computation with the first, so no barrier is needed there.
    values = jax.checkpoint(_masked(per_token, unembed, params), prevent_cse=whole)
    if whole:
        return values(hidden, inputs, weights)
    _, by_piece = jax.lax.scan(lambda _, xs: (None, values(*xs)), None, _split((hidden, inputs, weights), size))
    return _join(by_piece, length)


def _masked(per_token, unembed, params, factors: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """(hidden, inputs, weights) -> the values of `per_token`, 0 where the weight is 0.

    Masking the values alone is not enough: the gradient of a masked nan is 0 * nan. So the inputs are masked too.
    """

    def values(hidden, inputs, weights):
        live = weights != 0

        def harmless(x):
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            return jnp.where(live.reshape(live.shape + (1,) * (x.ndim - 2)), x, jnp.ones((), x.dtype))

        hidden, inputs = jax.tree.map(harmless, (hidden, inputs))
        result = per_token(unembed(params, hidden), inputs)
        for path, value in jax.tree.leaves_with_path(result):
            if value.shape != live.shape:
                raise ValueError(
                    f"per_token: the value{jax.tree_util.keystr(path)} has shape {value.shape} for tokens "
                    f"{live.shape}; expected one number a token"
                )
        if factors is not None and ("weight" in result or not factors.keys() <= result.keys()):
            raise ValueError(
                f"per_token: returns {sorted(result)}; expected every name of factors, {sorted(factors)}, and "
                "not `weight`, which is the name of the sum of the weights"
            )
        return jax.tree.map(lambda v: jnp.where(live, v, jnp.zeros((), v.dtype)), result)

    return values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(values, size, tokens, read, factors) -> tuple[jax.Array, Metrics]:
    """(total, sums) over all tokens. tokens: (hidden, inputs, weights). read: the other arrays that `values` uses."""

    def piece(xs):
        return _sums_of_piece(values, xs, read, factors)

    if size == tokens[0].shape[1]:
        return piece(tokens)
    pieces = _split(tokens, size)
    one = jax.eval_shape(piece, jax.tree.map(lambda x: x[0], pieces))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(lambda sums, xs: (jax.tree.map(jnp.add, sums, piece(xs)), None), zero, pieces)[0]


def _sums_of_piece(values, tokens, read, factors) -> tuple[jax.Array, Metrics]:
    weights = tokens[2]
    sums = {name: jnp.sum(weights * v) for name, v in values(*tokens, *read).items()}
    total = sum((factor * sums[name] for name, factor in factors.items()), jnp.zeros((), weights.dtype))
    return total, {**sums, "weight": jnp.sum(weights)}


def _forward(values, size, tokens, read, factors):
    """(total, sums), and for the backward pass the gradients of the total with respect to `factors`, `tokens` and
    `read`.

    The leaves of the arguments are pairs (value, whether it is differentiated): the gradient is None where it is not.
    """
    differentiated = [x.perturbed for x in jax.tree.leaves((tokens, read))]
    tokens, read, factors = jax.tree.map(lambda x: x.value, (tokens, read, factors))
    length, structure = tokens[0].shape[1], jax.tree.structure((tokens, read))

    def piece(tokens):
        leaves = jax.tree.leaves((tokens, read))

        def sums_of(changed):
            rest = iter(changed)
            mixed = [next(rest) if d else x for x, d in zip(leaves, differentiated, strict=True)]
            tokens, read = jax.tree.unflatten(structure, mixed)
            return _sums_of_piece(values, tokens, read, factors)

        changed = [x for x, d in zip(leaves, differentiated, strict=True) if d]
        (total, sums), gradient = jax.value_and_grad(sums_of, has_aux=True)(changed)
        rest = iter(gradient)
        by_token, by_read = jax.tree.unflatten(structure, [next(rest) if d else None for d in differentiated])
        return (total, sums), by_token, by_read

    if size == length:
        result, by_token, by_read = piece(tokens)
        return result, ({name: result[1][name] for name in factors}, by_token, by_read)

    def body(carry, xs):
        result, by_token, by_read = piece(xs)
        # The sum of many small terms: kept in float32 at least, whatever the dtype of the parameters.
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, (result, by_read)), by_token

    pieces = _split(tokens, size)
    result, _, by_read = jax.eval_shape(piece, jax.tree.map(lambda x: x[0], pieces))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (result, by_read))
    (result, by_read), by_token = jax.lax.scan(body, zero, pieces)
    by_read = jax.tree.map(lambda x, g: None if g is None else g.astype(x.dtype), read, by_read)
    return result, ({name: result[1][name] for name in factors}, _join(by_token, length), by_read)


def _backward(values, size, kept, cotangents):
    g = cotangents[0]  # of the total; the sums are metrics without gradients
    if isinstance(g, SymbolicZero):
        return None, None, None
    by_factor, by_token, by_read = jax.tree.map(lambda x: (g * x).astype(x.dtype), kept)
    return by_token, by_read, by_factor


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _piece(unembed, params, hidden: jax.Array, chunk: int | None, arrays: int) -> int:
    """The number of positions in a piece."""
    batch, length, _ = hidden.shape
    if chunk is not None:
        return min(chunk, length)
    return _chunk(batch, length, jax.eval_shape(unembed, params, hidden[:, :1]).shape[-1], arrays)


def _chunk(batch: int, length: int, vocab: int, arrays: int = 1) -> int:
    tokens = max(MAX_LOGITS // vocab, MIN_TOKENS) // arrays
    pieces = math.ceil(length / max(1, tokens // batch))
    return math.ceil(length / pieces)  # pieces of equal size, so that the last one has little padding


def _split(tree: Any, size: int) -> Any:
    """[B, T, ...] -> [pieces, B, size, ...], zero-padded. The batch axis stays whole, so its sharding does too."""

    def split(x):
        b, t, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(b, -1, size, *rest), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree: Any, length: int) -> Any:
    """The inverse of `_split`: [pieces, B, size, ...] -> [B, T, ...]."""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)
