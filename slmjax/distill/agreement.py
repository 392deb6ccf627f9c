"""How closely a model agrees with another one, such as a student with its teacher, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.distill.teacher import Teacher, average
from slmjax.errors import DataError
from slmjax.estimate import Estimate, ratio
from slmjax.losses.divergences import ForwardKL
from slmjax.losses.pieces import token_values
from slmjax.types import Batch, Key, Model, Params, unchanged


class Agreement(NamedTuple):
    """Means over tokens."""

    same: Estimate
    """The share of tokens where both find the same token likeliest"""
    kl: Estimate
    """KL(teacher || student), nats a token"""


def agreement(
    model: Model,
    params: Params,
    teacher: Teacher,
    batches: Iterable[Batch],
    *,
    tokens: int,
    prepare: Callable[[Batch, Key], Batch] = unchanged,
) -> Agreement:
    """
    Args:
        batches: of one shape, so that the program is compiled once.
        tokens: ids of the tokenizer, from 0; rows of the models' tables from there on are no tokens.
        prepare: (batch, key) -> the batch that both read. The key depends on the number of the batch alone.

    Raises:
        DataError: no token has a weight.
    """

    @jax.jit
    def sums(params: Params, frozen: Params, batch: Batch, key: Key) -> jax.Array:  # float32 [B, 3]
        batch = prepare(batch, key)
        read = (batch.tokens, batch.positions, batch.segment_ids)

        def per_token(logits: jax.Array, theirs: jax.Array) -> dict[str, jax.Array]:
            of_teacher, of_student = (
                average([x], temperature=1.0, outputs=logits.shape[-1], tokens=tokens)
                for x in (teacher.model.unembed(frozen, theirs), logits)
            )
            same = jnp.argmax(of_teacher, axis=-1) == jnp.argmax(of_student, axis=-1)
            return {"same": same.astype(jnp.float32), "kl": ForwardKL()(of_teacher, of_student)}

        hidden, theirs = model.apply(params, *read).hidden, teacher.model.apply(frozen, *read).hidden
        values = token_values(per_token, model.unembed, params, hidden, theirs, batch.weights)
        each = (values["same"], values["kl"], jnp.ones_like(values["kl"]))
        return jnp.stack([jnp.sum(batch.weights * x, axis=1) for x in each], axis=1)

    key = jax.random.key(0)
    found: list[Any] = [
        sums(params, teacher.params, jax.tree.map(jnp.asarray, batch), jax.random.fold_in(key, i))
        for i, batch in enumerate(batches)
    ]
    rows = np.concatenate([np.asarray(x, np.float64) for x in found]) if found else np.zeros((0, 3))
    rows = rows[rows[:, 2] > 0]
    if len(rows) == 0:
        raise DataError("nothing to compare: no batch holds a token with a target")
    same, kl, weight = rows.T
    return Agreement(ratio(same, weight), ratio(kl, weight))
