"""The loss that a stock runtime gets on a text, beside that of slmjax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.convert.gate import Check
from slmjax.data.tokenizer import Tokenizer
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.nn.initial import Normal
from slmjax.types import Params

Texts = tuple[tuple[int, ...], ...]
"""Token ids; each text by itself, of at least two tokens"""

MOST = 0.02
"""Largest allowed difference of the mean loss, nats a token, beside two of its standard errors: where a runtime rounds
activations, the losses of single tokens differ by more than their mean"""


def default_texts(decoder: Assembly, tokenizer: Tokenizer | None, text: str) -> Texts:
    """`text` as the model reads it, cut to its context; none if it does not predict the next token."""
    if tokenizer is None or not (decoder.causal and decoder.predicts_tokens):
        return ()
    ids = tuple(tokenizer.encode(text, bos=True))[: decoder.context]
    return (ids,) if len(ids) > 1 else ()


def log_probabilities(decoder: Assembly, params: Params, texts: Texts) -> list[np.ndarray]:
    """Of each text [T], the log-probability of each token but the first, float32 [T - 1]. In float32."""
    run, longest = _program(replace(decoder, initial=Normal())), max(map(len, texts), default=0)
    found = []
    with jax.default_matmul_precision("highest"):
        for text in texts:
            tokens, segments = np.zeros((2, 1, longest), np.int32)
            tokens[0, : len(text)], segments[0, : len(text)] = text, 1
            found.append(np.asarray(run(params, tokens, segments))[: len(text) - 1])
    return found


@functools.lru_cache(maxsize=1)
def _program(decoder: Assembly) -> Callable[..., jax.Array]:
    model = decoder.build(Compute(dtype="float32"))

    @jax.jit
    def run(params: Any, tokens: Any, segments: Any) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden = model.apply(params, tokens, positions, segments).hidden[0, :-1]
        scores = jax.nn.log_softmax(model.unembed(params, hidden).astype(jnp.float32))
        return jnp.take_along_axis(scores, tokens[0, 1:, None], axis=-1)[:, 0]

    return run


def check_loss(name: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Check:
    """Compares the mean losses.

    Args:
        name: of the runtime.
        ours, theirs: log-probabilities of the same tokens. Tokens for which the runtime gives none, NaN, are left out.
    """
    a, b = (-np.concatenate(x).astype(np.float64) for x in (ours, theirs))
    given = ~np.isnan(b)
    a, b = a[given], b[given]
    n = len(a)
    if n < 2:
        return Check(name=f"{name}: loss", found="no token to compare", expected="for information", passed=None)
    change = float((b - a).mean())
    limit = MOST + 2 * float((b - a).std(ddof=1)) / n**0.5
    return Check(
        name=f"{name}: loss",
        found=f"{b.mean():.4f} nats a token on {n} tokens, {a.mean():.4f} here: {change:+.1e}",
        expected=f"≤ {limit:.1e}: {MOST} and 2 standard errors",
        passed=bool(abs(change) <= limit),
    )
