"""`Decoder`, the one class of causal language models: an embedding, repeated patterns of blocks, a final norm."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.models.assembly import Assembly, Carry, Place, Stage, applied, run
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.block import Block
from slmjax.nn.compute import Compute
from slmjax.nn.embedding import Embedding, Logits, Projection, Unembedding
from slmjax.nn.heads import Head
from slmjax.nn.initial import Initial, Normal
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Cache as CacheCodec
from slmjax.nn.numerics import Numerics
from slmjax.nn.parts import Norm
from slmjax.nn.position import Learned
from slmjax.types import Batch, Key, Model, Output, Params, last_token

__all__ = ["Block", "Cache", "Decoder", "Place", "Stage"]


class Cache(NamedTuple):
    """The key-value cache of generation. Token i of each row lies in slot i, so shorter rows are padded on the left."""

    layers: Any  # for each stage, the caches of its mixers (`Mixer.init_cache`), stacked over its repeats
    segment_ids: jax.Array  # int32 [B, S]: 0 in slots that hold padding or are empty
    length: jax.Array  # int32 []: filled slots


@dataclass(frozen=True, kw_only=True)
class Decoder(Assembly):
    """A causal language model: `pattern`, `repeats` times, then the stages of `tail`."""

    causal: ClassVar[bool] = True

    tied: bool
    """Whether the unembedding reads the embedding's table"""
    final_norm: Norm | None
    position: Learned | None = None
    """Position vectors added to the embedding; rotary positions are a field of the mixers"""
    embed_scale: float = 1.0
    """Factor on the token vectors"""
    embed_norm: Norm | None = None
    """Norm of the embedding, before the first block"""
    table_width: int | None = None
    """Width of the embedding tables, if it is not `width`: then projections convert between the two (OPT-350m)"""
    logits: Logits = Logits()  # noqa: RUF009
    """Scale and soft cap of the logits"""
    head: Head | None = None
    """Output layer after the final norm in place of token logits, such as `LastTokenScore` for a classifier"""
    initial: Initial = Normal()  # noqa: RUF009
    """Initial values"""

    def build(self, compute: Compute = Compute(), numerics: Numerics = Numerics()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays: `numerics` is what they compute, `compute` how."""
        modules = {collect: self._module(compute, numerics, collect) for collect in (False, True)}
        table = "embed" if self.tied else "unembed"

        def init(key) -> Params:
            return nn.meta.unbox(self.drawn(key))

        def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False) -> Output:
            inside = {name: value for name, value in params.items() if name != "head"}
            return applied(self, modules[collect], inside, tokens, positions, segment_ids, cache, collect=collect)

        def unembed(params, hidden):
            if self.head is not None:
                return self._head(compute, numerics).apply({"params": params["head"]}, hidden, params["embed"]["table"])
            return self.logits(f"{table}/table", params[table]["table"], hidden, compute, numerics)

        return Model(
            init=init,
            apply=apply,
            unembed=unembed,
            axes=self.axes(),
            init_cache=functools.partial(self._init_cache, dtype=compute.dtype, codec=numerics.cache),
            context=self.context,
            vocab=self.vocab,
            read_at=last_token,
            rules=self.rules(),
        )

    def drawn(self, key: jax.Array) -> Params:
        """Initial parameters, each in its `Declared`."""
        one = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on the batch
        # `Compute()`, whatever the run uses: one loop over layers compiles faster, in less memory, to the same values.
        params: Any = self._module(Compute(), Numerics()).init(key, one, one, one, None)["params"]
        if self.head is None:
            return params
        hidden, table = jnp.zeros((1, self.table_width or self.width)), params["embed"]["table"].value
        head = self._head(Compute(), Numerics())
        return {**params, "head": head.init(jax.random.fold_in(key, 1), hidden, table)["params"]}

    def logit_products(self) -> int:
        """V times the width of the table; with a head, the head's multiply-adds."""
        width = self.table_width or self.width
        return self.vocab * width if self.head is None else self.head.logit_products(self.vocab, width)

    @property
    def example(self) -> str:
        return "inspect {}" if self.labels else 'generate {} --prompt "Once upon a time"'

    @property
    def predicts_tokens(self) -> bool:
        return self.head is None or self.head.predicts_tokens

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.head is None else self.head.names

    def evaluation_batch(self, batch: Batch, key: Key, special: Any) -> Batch:
        """The batch unchanged: its targets are the next tokens."""
        return batch

    def _module(self, compute: Compute, numerics: Numerics, collect: bool = False) -> Layer:
        return Layer(
            spec=Stack(decoder=self, collect=collect),
            compute=compute,
            initial=self.initial,
            numerics=numerics,
            branches=2 * self.layers,
        )

    def _head(self, compute: Compute, numerics: Numerics) -> Layer:
        return Layer(
            spec=self.head, compute=compute, initial=self.initial, numerics=numerics, branches=2 * self.layers,
            prefix="head",
        )  # fmt: skip

    def _init_cache(self, batch: int, length: int, *, dtype: str, codec: CacheCodec) -> Cache:
        def stacked(stage: Stage) -> Any:
            each = tuple(block.mixer.init_cache(batch, length, dtype, codec) for block in stage.pattern)
            return jax.tree.map(lambda x: jnp.zeros((stage.repeats, *x.shape), x.dtype), each)

        layers = tuple(stacked(stage) for stage in self.stages)
        return Cache(layers, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The decoder's forward pass, from tokens to the input of the unembedding."""

    decoder: Decoder
    collect: bool = False

    def __call__(
        self, layer: Layer, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None
    ) -> Output:
        d = self.decoder
        x = layer.child("embed", _embedding(d))(tokens, positions)
        mask, cache = _mask(segment_ids, cache)
        caches = tuple((None,) * len(stage.pattern) for stage in d.stages) if cache is None else cache.layers
        carry = Carry(x, caches, _shared(d, mask, layer.compute.dtype), d.no_auxiliary(segment_ids))
        after, streams = run(layer, d.stages, positions, mask, carry, self.collect)
        x = after.x
        if not d.tied and d.head is None:
            layer.child("unembed", Unembedding(vocab=d.vocab, width=d.table_width or d.width))()
        hidden = x if d.final_norm is None else layer.child("final_norm", d.final_norm)(x)
        if d.table_width is not None:
            hidden = layer.child("project_out", Projection(width=d.table_width))(hidden)
        return Output(
            hidden=hidden,
            cache=None if cache is None else cache._replace(layers=after.caches),
            blocks=jnp.concatenate([*streams, x[None]]) if self.collect else None,
            auxiliary=after.auxiliary,
        )


def _embedding(d: Decoder) -> Embedding:
    return Embedding(
        vocab=d.vocab,
        width=d.width,
        context=d.context,
        position=d.position,
        scale=d.embed_scale,
        norm=d.embed_norm,
        table_width=d.table_width,
    )


def _shared(d: Decoder, mask: Mask, dtype: str) -> dict[str, Any]:
    """The initial `Flow.shared`, before the first layer: zeros, since a scan needs the shapes."""
    batch, length = mask.key_segments.shape
    shared: dict[str, Any] = {}
    for block in d.blocks():
        shared |= block.mixer.init_shared(batch, length, dtype)
    return shared


def _mask(segment_ids: jax.Array, cache: Cache | None) -> tuple[Mask, Cache | None]:
    """The attention mask of these tokens, and the cache with their segment ids written."""
    if cache is None:
        return Mask.of_rows(segment_ids), None
    cached = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    after = cache._replace(segment_ids=cached, length=cache.length + segment_ids.shape[1])
    return Mask.of_cache(segment_ids, cached, cache.length), after
