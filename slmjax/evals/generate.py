"""Text from prompts: a batch at once, streamed as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.evals.decoding import NOTHING, Decoding, decoding
from slmjax.evals.sampling import GREEDY, Sampler
from slmjax.evals.text import Detokenizer, StopStrings
from slmjax.models.decoder import Decoder
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics
from slmjax.types import Params

Reason = Literal["eos", "stop", "length", "context"]

CHUNK = 16
"""Tokens between two looks at the text: what streaming waits for, and what a stop string may cost in vain"""
LEAST_PROMPT, LEAST_CACHE = 16, 128
"""Shortest lengths that are compiled for; longer ones are powers of two"""
AHEAD = 256
"""Slots for new tokens that a cache has at first, if so many are wanted"""


class Piece(NamedTuple):
    """What has become certain of one row's text."""

    row: int
    text: str
    tokens: tuple[int, ...]
    """The tokens that came with it, EOS included. Text may come later than its tokens"""
    reason: Reason | None = None
    """Set on a row's last piece: EOS came, a stop string came, `max_tokens` are made, or the context is full"""


class Generated(NamedTuple):
    """The continuation of one prompt."""

    text: str
    tokens: tuple[int, ...]
    reason: Reason


@dataclass(frozen=True)
class Generator:
    """A model ready to generate. Programs are compiled at first use of a (sampler, batch, length bucket) and kept.

    The same prompt and seed give the same text in any row-preserving batch: each row draws from `fold_in(seed, row)`
    and token number. (Across batch sizes matrix products may round differently.)
    """

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    compute: Compute = Compute()  # noqa: RUF009
    ends: tuple[int, ...] = ()
    """Tokens that end a text as EOS does: a chat model's end of turn"""
    numerics: Numerics = Numerics()  # noqa: RUF009
    _programs: dict[tuple[Sampler, tuple[int, ...]], Decoding] = field(default_factory=dict, compare=False)
    _prepared: list[Any] = field(default_factory=list, compare=False)

    def with_params(self, params: Params) -> Generator:
        """The same programs with other parameters: for samples while training."""
        return replace(self, params=params, _prepared=[])

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampler: Sampler = GREEDY,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Generated]:
        """The continuations of `prompts`, without the prompts. See `stream`."""
        texts = [""] * len(prompts)
        tokens: list[tuple[int, ...]] = [()] * len(prompts)
        reasons: list[Reason] = ["length"] * len(prompts)
        for piece in self.stream(prompts, sampler=sampler, max_tokens=max_tokens, stop=stop, seed=seed):
            texts[piece.row] += piece.text
            tokens[piece.row] += piece.tokens
            reasons[piece.row] = piece.reason or reasons[piece.row]
        return [Generated(*x) for x in zip(texts, tokens, reasons, strict=True)]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampler: Sampler = GREEDY,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Continues all prompts together; pieces come every few tokens, rows interleaved.

        A prompt is a text, or token ids that are taken as they are.

        A row ends with EOS, before the first of the `stop` strings (none of it is given), after `max_tokens`, or when
        prompt and continuation fill the model's context.

        Raises:
            UserError: no prompt, one that leaves no room in the context, or max_tokens below 1.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        writers = [Writer(self.tokenizer, row, prompt, stop, self._ends) for row, prompt in enumerate(ids)]
        room = [self.decoder.context - len(prompt) for prompt in ids]
        limits = np.array([min(max_tokens, r) for r in room], np.int32)
        ended = lambda row: writers[row].reason is not None  # noqa: E731
        for chunk in self.tokens(ids, sampler=sampler, limits=limits, seed=seed, ended=ended):
            for writer, row in zip(writers, chunk, strict=True):
                if writer.reason is None:
                    full = "context" if room[writer.row] < max_tokens else "length"
                    yield writer.write(row, limit=int(limits[writer.row]), full=full)

    def tokens(
        self,
        ids: Sequence[Sequence[int]],
        *,
        sampler: Sampler = GREEDY,
        limits: np.ndarray,
        seed: int = 0,
        ended: Callable[[int], bool] = lambda row: False,
    ) -> Iterator[np.ndarray]:
        """Token ids in, chunks int32 [B, n] of new ones out, `NOTHING` after a row's end.

        limits: the most new tokens of each row, int32 [B]. ended: asked between chunks whether a row shall stop early.
        """
        if not ids:
            raise UserError("no prompt; give at least one")
        if (low := int(limits.min())) < 1:
            raise UserError(f"max_tokens leaves {low} tokens to make; expected at least 1")
        programs, prepared = self._ready(sampler)
        wide = bucket(max(map(len, ids)), LEAST_PROMPT)
        padded = np.zeros((2, len(ids), wide), np.int32)  # left, so that all rows end in the same slot
        for row, prompt in enumerate(ids):
            padded[:, row, wide - len(prompt) :] = prompt, np.ones(len(prompt))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(ids)))
        most = int(limits.max())
        slots = bucket(wide + min(most, AHEAD), LEAST_CACHE)
        state = programs.prefill(prepared, *padded, keys, limits, length=slots)
        yield np.asarray(state.token)[:, None]
        used = wide  # the token just chosen has no slot yet
        made = 1
        while made < most:
            done = np.asarray(state.done) | [ended(row) for row in range(len(ids))]
            if done.all():
                return
            if used + CHUNK > slots:
                slots = bucket(used + CHUNK, LEAST_CACHE)
                state = programs.grow(state, length=slots)
            chunk, state = programs.decode(prepared, state._replace(done=jnp.asarray(done)), keys, limits, count=CHUNK)
            yield np.asarray(chunk)
            used, made = used + CHUNK, made + CHUNK

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt as the beginning of a document; ids stay as they are.

        Raises:
            UserError: it leaves no room in the model's context, has an id that the model does not know, or is empty and
                the tokenizer has no BOS or EOS.
        """
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.eos_id is not None:
            ids = [self.tokenizer.eos_id]  # where one document ends another begins
        if not ids:
            raise UserError("the prompt is empty, and the tokenizer has no BOS token to begin a text with")
        beyond = next((i for i in ids if not 0 <= i < self.decoder.vocab), None)
        if beyond is not None:
            raise UserError(f"the prompt has token {beyond}; the model has those from 0 to {self.decoder.vocab - 1}")
        if len(ids) >= self.decoder.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the model's context is {self.decoder.context}, with the "
                "continuation: shorten the prompt"
            )
        return ids

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.ends if self.tokenizer.eos_id is None else (self.tokenizer.eos_id, *self.ends)

    def _ready(self, sampler: Sampler) -> tuple[Decoding, Any]:
        key = (sampler, self._ends)
        if key not in self._programs:
            self._programs[key] = decoding(self.decoder, self.compute, sampler, self._ends, self.numerics)
        programs = self._programs[key]
        if not self._prepared:
            self._prepared.append(programs.prepare(self.params))
        return programs, self._prepared[0]


class Writer:
    """Turns one row's tokens into text and decides when it has ended."""

    def __init__(self, tokenizer: Tokenizer, row: int, prompt: Sequence[int], stop: Sequence[str], ends: Sequence[int]):
        self.row, self.ends = row, frozenset(ends)
        self.text, self.stops = Detokenizer(tokenizer.raw, prompt), StopStrings(stop)
        self.count = 0
        self.reason: Reason | None = None

    def write(self, chunk: np.ndarray, *, limit: int, full: Reason) -> Piece:
        """The next tokens [n] of the row -> what can be shown; what follows a stop string is dropped."""
        text, taken = "", []
        for token in chunk.tolist():
            if token == NOTHING or self.reason is not None:
                break
            taken.append(token)
            self.count += 1
            text += self.stops.push(self.text.push([token]))
            if self.stops.stopped:
                self.reason = "stop"
            elif token in self.ends:
                self.reason = "eos"
            elif self.count >= limit:
                self.reason = full
        if self.reason in ("eos", "length", "context"):
            text += self.stops.push(self.text.close())
            self.reason = "stop" if self.stops.stopped else self.reason
            text += self.stops.close()
        return Piece(self.row, text, tuple(taken), self.reason)


def bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())
