"""Which sequences a student and its teachers are compared on: those of the data, or what the student itself writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.data.spec import Data
from slmjax.distill.teacher import average
from slmjax.errors import UserError, positive
from slmjax.evals.decoding import NOTHING
from slmjax.losses.divergences import mixture
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token
from slmjax.types import Batch, Key, Model, Params, Special
from slmjax.views import without_objective

CHOSEN, KEYS = "sequences/chosen", "sequences/keys"
"""Names in `Batch.extra`: whether a row is continued, bool [B], and the key data of its samples, uint32 [B, n]"""


class Reader(NamedTuple):
    """A model that reads what is sampled."""

    model: Model
    params: Params


class Learned(NamedTuple):
    """What is learned from."""

    batch: Batch
    sampled: jax.Array  # bool [B, T]: whether the target was sampled; else it is one of the data


@dataclass(frozen=True, kw_only=True)
class Sequences(ABC):
    """The sequences of a training step. Evaluation reads those of the data."""

    samples: ClassVar[bool]
    """Whether some are sampled"""

    def reads(self, data: Data) -> None:  # noqa: B027  sequences of the data fit the data
        """
        Raises:
            UserError: sequences of these data are too short.
        """

    def with_special(self, special: Special) -> Sequences:
        """The same value, with the special token ids of the data's tokenizer."""
        return self

    def prepare(self, batch: Batch, key: Key) -> Batch:
        """Adds to the whole batch of a step what must not depend on how it is cut into micro-batches."""
        return batch

    @abstractmethod
    def __call__(self, student: Reader, teachers: Sequence[Reader], batch: Batch, *, tokens: int) -> Learned:
        """
        Args:
            batch: after `prepare`.
            tokens: ids of the tokenizer, from 0.
        """

    def flops(self, student: Assembly, teachers: Sequence[Assembly], length: int) -> float:
        """FLOPs of sampling a token of the batch needs, at sequences of that length."""
        return 0.0


class Step(NamedTuple):
    """What a loss that compares a student with teachers computes with."""

    params: Params
    """Of the student"""
    own: Any
    """What the objective has carried to this step (`views.carrying`); None in evaluation"""
    frozen: Params
    """Of the teachers, without gradient"""
    batch: Batch
    sampled: jax.Array  # bool [B, T]: as in `Learned`
    samples: bool
    """Whether some of the batch may be sampled"""


def begin_step(
    sequences: Sequences, model: Model, teachers: Mapping[str, Model], params: Any, frozen: Any, batch: Batch,
    *, tokens: int,
) -> Step:  # fmt: skip
    """Takes the arguments of a loss apart, and samples what `sequences` samples; in evaluation nothing.

    Args:
        teachers: by the name that their parameters have in `frozen`.
        tokens: ids of the tokenizer, from 0.
    """
    frozen = jax.lax.stop_gradient(frozen)
    params, own = without_objective(params)
    read = FromData() if own is None else sequences
    readers = [Reader(teacher, frozen[name]) for name, teacher in teachers.items()]
    batch, sampled = read(Reader(model, params), readers, batch, tokens=tokens)
    return Step(params, own, frozen, batch, sampled, read.samples)


@dataclass(frozen=True, kw_only=True)
class FromData(Sequences):
    """The sequences of the data."""

    samples: ClassVar[bool] = False

    def __call__(self, student: Reader, teachers: Sequence[Reader], batch: Batch, *, tokens: int) -> Learned:
        return Learned(batch, jnp.zeros(batch.tokens.shape, bool))


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Sequences):
    """Some rows of the batch are continued by the student as it is in this step, and are learned from in this form, so
    that it is corrected where its own text leads it. Agarwal et al. 2023 (GKD), arXiv:2306.13649, algorithm 1, where
    the choice is made for whole batches instead of rows.

    Of a row that is continued there remain the first `prompt` tokens of one document: of the first in the row that is
    longer than that, so that its end is never part of a prompt. They are followed by up to `new_tokens` sampled tokens
    and padding; the row's other documents are left out. A row without such a document stays as it is. Sampled tokens
    have weight 1, those of the prompt 0.

    Which rows are continued, and how, follows from the step and the row's place in the whole batch: micro-batches and
    devices change nothing. No gradient flows through the sampling.
    """

    samples: ClassVar[bool] = True

    fraction: float = 0.5
    """The probability that a row is continued, lambda of the paper"""
    prompt: int = 64
    """Tokens of a document that are kept"""
    new_tokens: int = 64
    """Tokens that are sampled, at most. `prompt + new_tokens` is at most the length of a row"""
    temperature: float = 1.0
    """Of sampling"""
    teacher_share: float = 0.0
    """Tokens are drawn from teacher_share * p + (1 - teacher_share) * q, p the teachers' and q the student's
    distribution; with 0 the teachers do not run while tokens are drawn. Gu et al. 2023 (MiniLLM), arXiv:2306.08543,
    section 2.2, have 0.2"""
    ends: tuple[int, ...] | None = None
    """Tokens that end a sample, which they are part of; None: the EOS of the data's tokenizer, and
    the ends of a text that the model names from which the run starts (generation_config.json)"""

    def __post_init__(self):
        for name in ("prompt", "new_tokens"):
            positive(**{f"objective.sequences.{name}": getattr(self, name)})
        for name in ("fraction", "teacher_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.sequences.{name}: {getattr(self, name)} is not between 0 and 1")
        if not self.temperature > 0:
            raise UserError(f"objective.sequences.temperature: {self.temperature} is not above 0; typical is 1")

    def reads(self, data: Data) -> None:
        if self.prompt + self.new_tokens > data.length:
            raise UserError(
                f"objective.sequences: prompt {self.prompt} and new_tokens {self.new_tokens} are together more than "
                f"the {data.length} tokens of a row (data.length); shorten them"
            )

    def with_special(self, special: Special) -> OnPolicy:
        if self.ends is not None:
            return self
        return replace(self, ends=special.ends)

    def prepare(self, batch: Batch, key: Key) -> Batch:
        rows = jnp.arange(len(batch.tokens))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1), rows)
        # The tokens of row r are drawn with the first of its two keys, as `evals.generate` does.
        choice, drawn = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(2))
        chosen = jax.vmap(jax.random.uniform)(choice) < self.fraction
        return batch._replace(extra={**batch.extra, CHOSEN: chosen, KEYS: jax.random.key_data(drawn)})

    def __call__(self, student: Reader, teachers: Sequence[Reader], batch: Batch, *, tokens: int) -> Learned:
        extra = {name: x for name, x in batch.extra.items() if name not in (CHOSEN, KEYS)}
        length = batch.tokens.shape[1]
        start, found = prompts(batch, self.prompt)
        live = batch.extra[CHOSEN] & found
        at = jnp.minimum(start[:, None] + jnp.arange(self.prompt), length - 1)
        prompt = jnp.take_along_axis(batch.tokens, at, axis=1)
        readers = [student, *(teachers if self.teacher_share else ())]
        known = min(tokens, *(reader.model.vocab for reader in (student, *teachers)))

        def scores(logits: Sequence[jax.Array]) -> jax.Array:
            sizes = {"temperature": self.temperature, "outputs": logits[0].shape[-1], "tokens": known}
            own = average(logits[:1], **sizes)
            return mixture(average(logits[1:], **sizes), own, self.teacher_share) if logits[1:] else own

        def sample() -> jax.Array:
            keys = jax.random.wrap_key_data(batch.extra[KEYS])
            return continuations(
                readers, scores, prompt, keys, live, count=self.new_tokens, ends=self.ends or ()
            )  # fmt: skip

        nothing = jnp.full((len(live), self.new_tokens), NOTHING, jnp.int32)
        # A micro-batch is often so small that none of its rows is continued.
        written = jax.lax.stop_gradient(jax.lax.cond(jnp.any(live), sample, lambda: nothing))
        theirs = continued(prompt, written, length)

        def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.where(live[:, None], a.astype(b.dtype), b)

        mixed = jax.tree.map(chosen, theirs, batch._replace(extra={}))
        return Learned(mixed._replace(extra=extra), live[:, None] & (theirs.weights > 0))

    def flops(self, student: Assembly, teachers: Sequence[Assembly], length: int) -> float:
        read = self.prompt + self.new_tokens
        each = [
            flops_per_token(model, read, self.new_tokens / read).attention / 3
            for model in (student, *(teachers if self.teacher_share else ()))
        ]
        return self.fraction * read / length * sum(each)


def prompts(batch: Batch, length: int) -> tuple[jax.Array, jax.Array]:
    """Where the first document of each row with more than `length` tokens begins, int [B], and whether there is one."""
    segments = batch.segment_ids
    later = jnp.pad(segments[:, length:], ((0, 0), (0, min(length, segments.shape[1]))))
    opens = (segments > 0) & (batch.positions == 0) & (segments == later)
    return jnp.argmax(opens, axis=1), jnp.any(opens, axis=1)


def continued(prompt: jax.Array, written: jax.Array, length: int) -> Batch:
    """Rows of one document each: a prompt and what was written after it.

    Args:
        prompt: int32 [B, P].
        written: int32 [B, N], `NOTHING` after the end.
        length: T of the batch.
    """
    room = ((0, 0), (0, length - prompt.shape[1] - written.shape[1]))
    tokens = jnp.pad(jnp.concatenate([prompt, written], axis=1), room, constant_values=NOTHING)
    here = tokens != NOTHING
    tokens = jnp.where(here, tokens, 0)
    slots = jnp.arange(length)
    follows = jnp.pad(here[:, 1:], ((0, 0), (0, 1))) & (slots >= prompt.shape[1] - 1)
    return Batch(
        tokens=tokens,
        targets=jnp.where(follows, jnp.roll(tokens, -1, axis=1), 0),
        weights=follows.astype(jnp.float32),
        positions=jnp.where(here, slots, 0).astype(jnp.int32),
        segment_ids=here.astype(jnp.int32),
    )


def continuations(
    readers: Sequence[Reader],
    scores: Any,
    prompt: jax.Array,
    keys: Any,
    live: jax.Array,
    *,
    count: int,
    ends: Sequence[int],
) -> jax.Array:
    """Draws tokens one after another. Token i of a row is drawn with `fold_in(its key, i)`.

    Args:
        readers: models with caches of their own, which all read the same tokens; without gradients.
        scores: logits [B, V] of each -> what a token is drawn from, [B, V'], log-probabilities up to a constant.
        prompt: int32 [B, P], equally long for all rows.
        keys: PRNG keys [B].
        live: bool [B]; nothing is drawn for the other rows.
        count: N.
        ends: tokens after which a row has ended.

    Returns:
        int32 [B, N], `NOTHING` after the end of a row.
    """
    rows, length = prompt.shape
    params = jax.lax.stop_gradient([reader.params for reader in readers])

    def read(caches: Any, tokens: jax.Array, start: Any) -> tuple[Any, jax.Array]:
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        ones = jnp.ones_like(tokens)
        out = [
            reader.model.apply(p, tokens, positions, ones, cache=cache)
            for reader, p, cache in zip(readers, params, caches, strict=True)
        ]
        logits = [r.model.unembed(p, x.hidden[:, -1]) for r, p, x in zip(readers, params, out, strict=True)]
        return [x.cache for x in out], scores(logits)

    def more(carry: Any) -> jax.Array:
        _, _, _, done, i = carry
        return (i < count) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        caches, log_probs, out, done, i = carry
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        token = jax.vmap(jax.random.categorical)(each, log_probs.astype(jnp.float32)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(done, NOTHING, token)[:, None], i, axis=1)
        done = done | jnp.isin(token, jnp.array(ends, jnp.int32))
        caches, log_probs = read(caches, token[:, None], length + i)
        return caches, log_probs, out, done, i + 1

    caches, log_probs = read([r.model.init_cache(rows, length + count) for r in readers], prompt, jnp.int32(0))
    out = jnp.full((rows, count), NOTHING, jnp.int32)
    return jax.lax.while_loop(more, step, (caches, log_probs, out, ~live, jnp.int32(0)))[2]
