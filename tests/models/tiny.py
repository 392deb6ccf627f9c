"""Decoders small enough for tests, with parameters far enough from 0 and 1 that every one of them matters."""

import functools
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.tree import map_with_path
from slmjax.types import Batch

VOCAB, LENGTH = 61, 24


def tiny_llama(**changes):
    sizes = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 48, "vocab": VOCAB, "context": 64}
    return llama(**{**sizes, **changes})


def tiny_gpt2(**changes):
    return gpt2(**{"layers": 3, "width": 32, "heads": 4, "vocab": VOCAB, "context": 64, **changes})


def tiny_pattern():
    """Two kinds of block, twice: theta differs between them."""
    one, two = (tiny_llama(theta=theta).pattern[0] for theta in (1e4, 1e2))
    return replace(tiny_llama(), pattern=(one, two), repeats=2)


DECODERS = {"llama": tiny_llama(), "gpt2": tiny_gpt2(), "untied": tiny_llama(tied=False), "pattern": tiny_pattern()}


def parameters(decoder, model, scale=0.3):
    """Random parameters that depend on path and shape only, so that two decoders share what they have in common."""

    def leaf(path, x):
        noise = jax.random.normal(jax.random.key(zlib.crc32(path.encode())), x.shape)
        return (1.0 if path.endswith("/scale") else 0.0) + scale * noise

    return map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def batch(rows=2, length=LENGTH, documents=1, seed=0):
    """Rows of `documents` equal documents and random weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    each = length // documents
    segments = np.minimum(np.arange(length) // each, documents - 1).astype(np.int32) + 1
    positions = np.arange(length, dtype=np.int32) - (segments - 1) * each
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        weights=jnp.asarray(rng.random((rows, length)), jnp.float32),
        positions=jnp.asarray(np.tile(positions, (rows, 1))),
        segment_ids=jnp.asarray(np.tile(segments, (rows, 1))),
    )


def logits(model, params, b):
    """Compiled as one program: dozens of small ones would take longer."""
    return _logits(model.apply, model.unembed, params, b)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(apply, unembed, params, b):
    return unembed(params, apply(params, b.tokens, b.positions, b.segment_ids).hidden)


def steps(model):
    """(params, cache, batch) -> the output and the logits of the next tokens of each row."""

    @jax.jit
    def step(params, cache, b):
        out = model.apply(params, b.tokens, b.positions, b.segment_ids, cache=cache)
        return out, model.unembed(params, out.hidden)

    return step


def columns(b, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], b)
