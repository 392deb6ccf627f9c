"""A trained model whose predictions another model learns, and how its vocabulary is aligned with the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.compress.ptq.rtn import nearest, usual
from slmjax.compress.quant.into_memory import held, with_codes
from slmjax.compress.quant.uniform import Symmetric
from slmjax.compress.quant.view import Packed, Rule, chosen
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.types import Model, Params


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model."""

    source: str
    """As the user wrote it: the MODEL of a command"""
    assembly: Assembly
    model: Model
    """`assembly`, built for this platform"""
    params: Params
    tokens: int | None = None
    """Ids of its own tokenizer, from 0; None: as many as it has rows"""


def check(source: str, theirs: Assembly, student: Assembly, length: int) -> None:
    """Checks that a student of this kind can learn from this teacher.

    Args:
        source: the teacher, as the user wrote it.
        theirs: its shape.
        length: of the sequences that both read.

    Raises:
        UserError: one is a decoder and the other an encoder, one is a classifier and the other not, or the teacher
            cannot read sequences of this length.
    """
    if theirs.causal != student.causal:
        kinds = {True: "a decoder", False: "an encoder"}
        raise UserError(
            f"objective.teachers: {source} is {kinds[theirs.causal]} and the student is {kinds[student.causal]}; "
            "choose a teacher of the student's kind"
        )
    if theirs.labels != student.labels:
        names = [", ".join(x.labels) or "none" for x in (theirs, student)]
        raise UserError(
            f"objective.teachers: {source} has the labels {names[0]}, and the student {names[1]}; they must be the "
            "same, in the same order"
        )
    if length > theirs.context:
        raise UserError(
            f"data.length is {length}, longer than the context {theirs.context} of the teacher {source}; shorten the "
            "sequences"
        )


def rounded(teacher: Teacher, bits: int) -> Teacher:
    """The teacher with the matrices of its layers rounded to nearest, a scale for each output channel, and kept as
    codes, which are decoded where they are used."""
    quantizer = Symmetric(bits=bits)
    axes, weights = teacher.assembly.axes(), tree.flatten(teacher.params)
    of_path, packed = tree.flatten(axes, is_leaf=tree.is_axes), {}
    for path in chosen(axes, (Rule(quantizer=quantizer),)):
        if path in weights:  # of a teacher on disk only the output table is here
            blocks = quantizer.granularity.cut(tuple(weights[path].shape), of_path[path], path)
            codes = nearest(quantizer, jnp.asarray(weights[path]), blocks, usual)
            packed[path] = Packed(codes, quantizer.grid, blocks, of_path[path])
    return replace(teacher, params=held(with_codes(teacher.params, packed)))


def average(logits: Sequence[jax.Array], *, temperature: float, outputs: int, tokens: int | None) -> jax.Array:
    """The log of the mean of the teachers' probabilities, [..., V]: `combined`, normalised."""
    return jax.nn.log_softmax(combined(logits, temperature=temperature, outputs=outputs, tokens=tokens))


def combined(logits: Sequence[jax.Array], *, temperature: float, outputs: int, tokens: int | None) -> jax.Array:
    """Logits of the mean of the teachers' probabilities, over the student's outputs; those of one teacher as they are.

    Models pad their tables to a round number of rows, so equal tokenizers do not mean equal numbers of logits: what
    counts is the id. Rows without a token have probability 0.

    Args:
        logits: of each teacher [..., its rows].
        temperature: each teacher's probabilities are softmax(logits / temperature).
        outputs: V, the number of the student's logits.
        tokens: ids of the tokenizer, from 0; rows from there on stand for no token. None: every row stands for one.

    Returns:
        [..., V], -inf where the probability is 0.
    """
    known = outputs if tokens is None else min(outputs, tokens)

    def aligned(z: jax.Array) -> jax.Array:
        z = z[..., :outputs] / temperature
        if z.shape[-1] < outputs:
            missing = [(0, 0)] * (z.ndim - 1) + [(0, outputs - z.shape[-1])]
            z = jnp.pad(z, missing, constant_values=-jnp.inf)
        return z if known == outputs else jnp.where(jnp.arange(outputs) < known, z, -jnp.inf)

    if len(logits) == 1:
        return aligned(logits[0])
    each = [jax.nn.log_softmax(aligned(z)) for z in logits]
    largest = jnp.max(jnp.stack(each), axis=0)
    live = largest > -jnp.inf
    total = sum(jnp.exp(x - jnp.where(live, largest, 0.0)) for x in each)
    return jnp.where(live, jnp.where(live, largest, 0.0) + jnp.log(total / len(each)), -jnp.inf)
