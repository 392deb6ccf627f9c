"""How important layers, channels and heads are, and which to keep. `models.slicing` cuts the others out of a model.

Activations are those of a trained model on some text; `weights` [B, T] are 0 for tokens that do not count (padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.errors import UserError


def block_influence(blocks: Any, weights: Any = None) -> jax.Array:
    """1 - the mean cosine between the residual stream before and after each layer: 0 for a layer that changes nothing.

    Args:
        blocks: [L + 1, B, T, D]: `Output.blocks`.

    Returns:
        float32 [L]

    References:
        Men et al. 2024 (ShortGPT), arXiv:2403.03853, equation 1
    """
    x = jnp.asarray(blocks, jnp.float32)
    before, after = x[:-1], x[1:]
    lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosines = jnp.sum(before * after, axis=-1) / jnp.maximum(lengths, 1e-12)
    return 1.0 - jnp.average(cosines, axis=(1, 2), weights=_counted(cosines, weights))


def channel_importance(activations: Any, weights: Any = None) -> jax.Array:
    """The mean of |activation| over each sequence, and of these the L2 norm over the batch.

    Args:
        activations: [..., B, T, C]: of hidden channels the inputs of the down projection; of channels of the residual
            stream the outputs of a norm.

    Returns:
        float32 [..., C]. For channels of the residual stream, sum it over all norms.

    References:
        Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2
    """
    size = jnp.abs(jnp.asarray(activations, jnp.float32))
    counted = _counted(size[..., 0], weights)
    means = jnp.sum(size * counted[..., None], axis=-2) / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1e-12)
    return jnp.linalg.norm(means, axis=-2)


def head_importance(activations: Any, weights: Any = None) -> jax.Array:
    """`channel_importance` of the length of each head's output, [..., B, T, H, K], which is the input of the output
    projection. float32 [..., H]."""
    return channel_importance(jnp.linalg.norm(jnp.asarray(activations, jnp.float32), axis=-1), weights)


def most_important(importance: Any, keep: int) -> tuple[int, ...]:
    """The indices of the `keep` highest of [C], ascending; of equal ones the first are kept.

    Raises:
        UserError: there are not so many.
    """
    values = np.asarray(importance, np.float64)
    if not 1 <= keep <= values.size:
        raise UserError(f"keep is {keep}; expected 1 to {values.size}")
    return tuple(sorted(int(i) for i in np.argsort(-values, kind="stable")[:keep]))


def most_important_heads(importance: Any, kv_heads: int, *, keep: int, keep_kv: int) -> tuple[int, ...]:
    """The `keep` query heads to keep of [H], ascending: equally many of each of `keep_kv` groups that share keys and
    values, in which attention stays grouped. Groups are ranked by the heads that would be kept of them.

    Args:
        kv_heads: groups that there are now; query heads i, i + 1, ... of H / kv_heads share one.

    Raises:
        UserError: the heads cannot be divided in this way.
    """
    values = np.asarray(importance, np.float64)
    if values.size % kv_heads:
        raise UserError(f"kv_heads is {kv_heads}, which does not divide the {values.size} heads")
    size = values.size // kv_heads
    if not 1 <= keep_kv <= kv_heads or keep < 1 or keep % keep_kv or keep // keep_kv > size:
        raise UserError(
            f"keep is {keep} and keep_kv {keep_kv}; expected 1 to {kv_heads} groups with equally many heads, "
            f"1 to {size} each"
        )
    groups = values.reshape(kv_heads, size)
    within = [most_important(group, keep // keep_kv) for group in groups]
    kept = most_important([group[list(heads)].sum() for group, heads in zip(groups, within, strict=True)], keep_kv)
    return tuple(g * size + head for g in kept for head in within[g])


def groups_of(heads: Sequence[int], of: int, kv_heads: int) -> tuple[int, ...]:
    """The groups of keys and values that these query heads (ascending, of `of`) read.

    Raises:
        UserError: some group keeps more of its heads than another.
    """
    group = [head // (of // kv_heads) for head in heads]
    kept = tuple(sorted(set(group)))
    counts = {g: group.count(g) for g in kept}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"heads: {list(heads)} keeps unequal numbers of heads of the groups that share keys and values ({counts}); "
            "keep equally many of each, or none"
        )
    return kept


def _counted(like: Any, weights: Any) -> jax.Array:
    """Which tokens count, in the shape of `like` [..., B, T]."""
    real = jnp.ones(like.shape[-2:]) if weights is None else jnp.asarray(weights) > 0
    return jnp.broadcast_to(real.astype(jnp.float32), like.shape)
