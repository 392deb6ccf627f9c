"""The compiled part of generation: prompts fill the key-value cache, then one program generates token after token.

What makes it fast: the parameters are cast to the compute dtype and split into layers once, before the first token (a
slice of a stacked array would be copied for every token; of quantized weights, which are short, it is, so that they
are in memory once); the cache is donated, and only as long as its tokens need,
rounded up to a power of two; one call generates many tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.evals.sampling import Sampler
from slmjax.models.decoder import Decoder
from slmjax.nn.compute import Compute, KeepAll
from slmjax.nn.encoded import Weight, is_encoded
from slmjax.nn.numerics import Numerics, Product
from slmjax.types import Params

NOTHING = -1
"""Token id that marks the places after the end of a finished row"""


class State(NamedTuple):
    """State of generation between two tokens. B rows, V tokens in the vocabulary."""

    cache: Any
    token: jax.Array  # int32 [B]: chosen, not yet an input of the model
    position: jax.Array  # int32 [B]: of `token`
    seen: jax.Array  # bool [B, V]: tokens that occur in the prompt or were generated
    made: jax.Array  # int32 []: tokens chosen so far
    done: jax.Array  # bool [B]


class Decoding(NamedTuple):
    """Pure functions, jitted. A new batch size, prompt length or cache length compiles again."""

    prepare: Callable[[Params], Any]
    """Parameters of the decoder -> `prepared`, for the other functions"""
    prefill: Callable[..., State]
    """(prepared, tokens [B, P], segment_ids [B, P], keys [B], limits [B], length=slots) -> the state after the first
    chosen token"""
    decode: Callable[..., tuple[jax.Array, State]]
    """(prepared, state, keys [B], limits [B], count=n) -> int32 [B, n] tokens (`NOTHING` after the end of a row) and
    the state; stops early when every row is done. The state is donated"""
    grow: Callable[..., State]
    """(state, length=slots) -> the state with a longer cache"""


def decoding(
    decoder: Decoder,
    compute: Compute,
    sampler: Sampler,
    eos: tuple[int, ...],
    numerics: Numerics = Numerics(),  # noqa: B008
    *,
    stacked: bool = False,
) -> Decoding:
    """The compiled functions that generate with `decoder`.

    Args:
        stacked: whether layers stay stacked in one array and run in a loop, for quantized weights (`encoded_layers`).
        eos: tokens that end a row.
    """
    compute = replace(compute, remat=KeepAll(), unroll=1)
    if stacked:
        model = decoder.build(compute, numerics)
    else:
        paths = tuple((f"layers/{number}/", f"{place.path}/") for place in decoder.places() for number in place.numbers)
        product = Stacked(product=numerics.product, paths=paths if decoder.layers > 1 else ())
        model = unrolled(decoder).build(compute, replace(numerics, product=product))

    def choose(prepared: Any, state: State, hidden: jax.Array, keys: Any, limits: jax.Array) -> State:
        """hidden [B, D] of the last token -> the state with the next one."""
        logits = model.unembed(prepared["unembed"], hidden)
        token = sampler(jax.vmap(jax.random.fold_in, (0, None))(keys, state.made), logits, state.seen)
        made = state.made + 1
        return state._replace(
            token=token,
            position=state.position + 1,
            seen=state.seen.at[jnp.arange(len(token)), token].set(True),
            made=made,
            done=state.done | jnp.isin(token, jnp.array(eos, jnp.int32)) | (made >= limits),
        )

    def prefill(
        prepared: Any, tokens: jax.Array, segment_ids: jax.Array, keys: Any, limits: jax.Array, *, length: int
    ) -> State:
        rows = tokens.shape[0]
        positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
        cache = model.init_cache(rows, length)
        output = model.apply(prepared["apply"], tokens, positions, segment_ids, cache=cache)
        seen = jnp.zeros((rows, decoder.vocab), bool).at[jnp.arange(rows)[:, None], tokens].max(segment_ids > 0)
        start = State(output.cache, tokens[:, -1], positions[:, -1], seen, jnp.int32(0), limits <= 0)
        return choose(prepared, start, output.hidden[:, -1], keys, limits)

    def decode(prepared: Any, state: State, keys: Any, limits: jax.Array, *, count: int) -> tuple[jax.Array, State]:
        rows = len(state.token)

        def more(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
            state, _, i = carry
            return (i < count) & ~jnp.all(state.done)

        def step(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
            state, out, i = carry
            ones = jnp.ones((rows, 1), jnp.int32)
            output = model.apply(
                prepared["apply"], state.token[:, None], state.position[:, None], ones, cache=state.cache
            )
            before = state.done
            state = choose(prepared, state._replace(cache=output.cache), output.hidden[:, 0], keys, limits)
            chosen = jnp.where(before, NOTHING, state.token)
            return state, jax.lax.dynamic_update_slice(out, chosen[:, None], (0, i)), i + 1

        out = jnp.full((rows, count), NOTHING, jnp.int32)
        state, out, _ = jax.lax.while_loop(more, step, (state, out, jnp.int32(0)))
        return out, state

    def grow(state: State, *, length: int) -> State:
        empty = model.init_cache(len(state.token), length)
        cache = jax.tree.map(
            lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim), empty, state.cache
        )
        return state._replace(cache=cache)

    return Decoding(
        prepare=functools.partial(prepare, decoder, compute, stacked=stacked),
        prefill=jax.jit(prefill, static_argnames="length"),
        decode=jax.jit(decode, static_argnames="count", donate_argnames="state"),
        grow=jax.jit(grow, static_argnames="length"),
    )


@dataclass(frozen=True, kw_only=True)
class Stacked(Product):
    """Calls `product` with the path that a parameter of the unrolled decoder has in the decoder with stacked layers."""

    product: Product
    paths: tuple[tuple[str, str], ...]
    """(prefix of a path in the unrolled decoder, the corresponding prefix in the stacked one)"""

    def __call__(self, path: str, equation: str, x: jax.Array, weight: Weight, einsum: Callable) -> jax.Array:
        for prefix, stacked in self.paths:
            if path.startswith(prefix):
                path = stacked + path.removeprefix(prefix)
                break
        return self.product(path, equation, x, weight, einsum)


def unrolled(decoder: Decoder) -> Decoder:
    """A decoder that computes the same, with separate parameters for each layer: `layers/0/...`, `layers/1/...`."""
    return replace(decoder, pattern=decoder.blocks(), repeats=1, tail=())


def unroll(decoder: Decoder, params: Params) -> Params:
    """Parameters of `decoder` -> those of `unrolled(decoder)`."""
    if decoder.repeats == 1 and not decoder.tail:
        return params
    layers: dict[str, Any] = {}
    for place in decoder.places():
        stacked = params
        for name in place.path.split("/"):
            stacked = stacked[name]
        layers |= {
            str(number): jax.tree.map(lambda x, i=i: x[i : i + 1], stacked) for i, number in enumerate(place.numbers)
        }
    rest = {name: value for name, value in params.items() if not name.startswith("layers")}
    return {**rest, "layers": layers["0"] if len(layers) == 1 else layers}


def encoded_layers(params: Params) -> bool:
    """Whether parameters of layers are in a shorter form than arrays."""
    flat = tree.flatten(params, is_leaf=is_encoded)
    return any(path.startswith("layers") and is_encoded(x) for path, x in flat.items())


def prepare(decoder: Decoder, compute: Compute, params: Params, *, stacked: bool = False) -> dict[str, Params]:
    """Casts parameters and splits them into layers (unless `stacked`), once. Rounds exactly what the model would round
    for every token.

    Matrices of layers are cast to the compute dtype; gains, biases and the tables that are looked up stay float32.
    """

    def cast(path: str, x: Any) -> Weight:
        matrix = path.startswith("layers") and x.ndim > 2 and not path.endswith(("bias", "scale"))
        return x if is_encoded(x) else jnp.asarray(x, compute.dtype if matrix else None)

    apply = tree.map_with_path(cast, params, is_leaf=is_encoded)
    apply = apply if stacked else unroll(decoder, apply)
    name = "embed" if decoder.tied else "unembed"
    table = params[name]["table"]
    unembed = {name: {"table": table if is_encoded(table) else jnp.asarray(table, compute.dtype)}}
    return {"apply": apply, "unembed": unembed}
