"""Reductions of logits in forms that are fast on a CPU, too: with a large vocabulary the usual ones take as long as the
exponentials of a softmax, or several times that."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128
"""Logits of one block of `likeliest`"""


@jax.custom_vjp
def at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [..., V] at targets int [...] -> [...]; 0 for a target that is not in 0..V-1.

    The gradient of a gather is a scatter; that of this one is a comparison, which is computed together with the
    softmax.
    """
    return _gathered(logits, targets)


def _gathered(logits: jax.Array, targets: jax.Array) -> jax.Array:
    found = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill", fill_value=0)
    return jnp.where(targets < 0, 0, found[..., 0])


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _gathered(logits, targets), (targets, logits.shape[-1])


def _backward(saved: tuple[jax.Array, int], g: jax.Array) -> tuple[jax.Array, None]:
    targets, vocab = saved
    hit = jnp.arange(vocab, dtype=targets.dtype) == targets[..., None]
    return jnp.where(hit, g[..., None], jnp.zeros((), g.dtype)), None


at.defvjp(_forward, _backward)


def largest(logits: jax.Array) -> jax.Array:
    """The maximum of logits [..., V] -> [...], without a gradient. It shares its work with `likeliest`."""
    return jax.lax.platform_dependent(jax.lax.stop_gradient(logits), cpu=_largest_of_blocks, default=_largest)


def likeliest(logits: jax.Array) -> jax.Array:
    """The index of the largest of logits [..., V], the first of equal ones: int32 [...].

    On a CPU in two steps, over blocks and within one block, since XLA computes a maximum alone with vector
    instructions, and a maximum together with its index without them.
    """
    return jax.lax.platform_dependent(jax.lax.stop_gradient(logits), cpu=_likeliest_of_blocks, default=_likeliest)


def exponentials(logits: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of logits [..., V] with the maximum `most` [...]: exp(logits - most) [..., V], the sum of that [...], and the log
    of the sum of exp(logits) [...]."""
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    powers = jnp.exp(logits - most[..., None])
    total = jnp.sum(powers, axis=-1)
    return powers, total, most + jnp.log(total)


def _largest(logits: jax.Array) -> jax.Array:
    return jnp.max(logits, axis=-1)


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _blocks(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., V // BLOCK, BLOCK], and the rest [..., V % BLOCK]."""
    whole = logits.shape[-1] // BLOCK * BLOCK
    return logits[..., :whole].reshape(*logits.shape[:-1], -1, BLOCK), logits[..., whole:]


def _largest_of_blocks(logits: jax.Array) -> jax.Array:
    if logits.shape[-1] < 2 * BLOCK:
        return _largest(logits)
    blocks, rest = _blocks(logits)
    most = jnp.max(jnp.max(blocks, axis=-1), axis=-1)
    return jnp.maximum(most, jnp.max(rest, axis=-1)) if rest.shape[-1] else most


def _likeliest_of_blocks(logits: jax.Array) -> jax.Array:
    if logits.shape[-1] < 2 * BLOCK:
        return _likeliest(logits)
    blocks, rest = _blocks(logits)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)[..., None]
    inside = jnp.argmax(jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :], axis=-1)[..., None]
    found = (block * BLOCK + inside).astype(jnp.int32)
    if rest.shape[-1]:
        other = jnp.argmax(rest, axis=-1, keepdims=True).astype(jnp.int32)
        larger = jnp.take_along_axis(rest, other, axis=-1) > jnp.take_along_axis(logits, found, axis=-1)
        found = jnp.where(larger, other + blocks.shape[-2] * BLOCK, found)
    return found[..., 0]
