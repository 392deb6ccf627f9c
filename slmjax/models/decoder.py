"""The one decoder, assembled from values: a pattern of blocks, repeated, between an embedding and a final norm."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.compute import Compute
from slmjax.nn.embedding import Embedding, Unembedding, logits
from slmjax.nn.layer import Declared, Initial, Layer
from slmjax.nn.parts import FeedForward, Mixer, Norm
from slmjax.nn.position import Learned
from slmjax.tree import flatten
from slmjax.types import Model, Output, Params


class Cache(NamedTuple):
    """What generation remembers. Row b's token i lies in slot i, so rows of unequal length are padded on the left."""

    layers: Any  # each mixer's own, stacked over layers: k, v [L, B, S, G, K]
    segment_ids: jax.Array  # int32 [B, S]: 0 where padding or still empty
    length: jax.Array  # int32 []: slots filled


@dataclass(frozen=True, kw_only=True)
class Block:
    """x + mixer(norm(x)), then x + mlp(norm(x)): pre-norm. Xiong et al. 2020, arXiv:2002.04745."""

    mixer: Mixer
    mlp: FeedForward
    norm: Norm

    def __call__(
        self, layer: Layer, x: jax.Array, table: Any, mask: Mask, cache: Any, depth: jax.Array
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], and the cache with these tokens written at layer `depth` of its stack."""
        label = self.mixer.label
        y = layer.child(f"{label}_norm", self.norm)(x)
        y, cache = layer.child(label, self.mixer)(y, table, mask, cache, depth)
        x = x + y
        return x + layer.child("mlp", self.mlp)(layer.child("mlp_norm", self.norm)(x)), cache


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The blocks that one iteration of the scan over layers runs."""

    blocks: tuple[Block, ...]
    collect: bool

    def __call__(
        self, layer: Layer, carry: tuple, depth: jax.Array, tables: tuple, mask: Mask
    ) -> tuple[tuple, jax.Array | None]:
        """(x [B, T, D], caches) -> the same after these blocks, and the x before each if they are collected."""
        x, caches = carry
        before, after = [], []
        for i, (block, table, cache) in enumerate(zip(self.blocks, tables, caches, strict=True)):
            before.append(x)
            args = (x, table, mask, cache, depth)
            # A single block's parameters lie in layers/..., several blocks' in layers/0/..., layers/1/...
            x, cache = block(layer, *args) if len(self.blocks) == 1 else layer.child(str(i), block)(*args)
            after.append(cache)
        return (x, tuple(after)), jnp.stack(before) if self.collect else None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal language model. `pattern` is repeated `repeats` times: L = len(pattern) * repeats layers."""

    vocab: int
    width: int
    pattern: tuple[Block, ...]
    repeats: int
    context: int
    """Longest sequence in tokens"""
    tied: bool
    """Whether the unembedding reads the embedding's table"""
    final_norm: Norm
    position: Learned | None = None
    """Positions added to the embedding; rotary ones belong to each mixer"""
    initial: Initial = Initial()  # noqa: RUF009
    """Initial values; `residual` is multiplied by 1/sqrt(2L) in `build`"""

    def __post_init__(self):
        for name in ("vocab", "width", "repeats", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: {getattr(self, name)} is not positive")
        if not self.pattern:
            raise UserError("model.pattern: empty; give at least one Block")

    @property
    def layers(self) -> int:
        """L"""
        return len(self.pattern) * self.repeats

    def build(self, compute: Compute = Compute()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays, computed as `compute` says."""
        modules = {collect: self._module(compute, collect) for collect in (False, True)}

        def init(key) -> Params:
            return nn.meta.unbox(_init(modules[False], key))

        def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False) -> Output:
            output: Any = modules[collect].apply({"params": params}, tokens, positions, segment_ids, cache)
            return output

        def unembed(params, hidden):
            return logits(params["embed" if self.tied else "unembed"]["table"], hidden, compute)

        return Model(
            init=init,
            apply=apply,
            unembed=unembed,
            axes=jax.tree.map(lambda p: p.names, self.declared(), is_leaf=_is_declared),
            init_cache=functools.partial(self._init_cache, dtype=compute.dtype),
            context=self.context,
            vocab=self.vocab,
        )

    def declared(self) -> Params:
        """The parameter tree, its leaves `Declared`: abstract `value`, logical axes `names`, `initial` in words."""
        return jax.eval_shape(functools.partial(_init, self._module(Compute())), jax.random.key(0))

    def paths(self) -> tuple[str, ...]:
        """The path of each parameter."""
        return tuple(flatten(self.declared(), is_leaf=_is_declared))

    def _module(self, compute: Compute, collect: bool = False) -> Layer:
        initial = replace(self.initial, residual=self.initial.residual / math.sqrt(2 * self.layers))
        return Layer(spec=Stack(decoder=self, collect=collect), compute=compute, initial=initial)

    def _init_cache(self, batch: int, length: int, *, dtype: str) -> Cache:
        layers = tuple(block.mixer.init_cache(batch, length, dtype) for block in self.pattern)
        stacked = jax.tree.map(lambda x: jnp.zeros((self.repeats, *x.shape), x.dtype), layers)
        return Cache(stacked, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


def _init(module: Layer, key: jax.Array) -> Params:
    one = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on the batch
    return module.init(key, one, one, one, None)["params"]


def _is_declared(x: Any) -> bool:
    return isinstance(x, Declared)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The decoder's forward pass, from tokens to what the unembedding reads."""

    decoder: Decoder
    collect: bool = False

    def __call__(
        self, layer: Layer, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None
    ) -> Output:
        d = self.decoder
        embedding = Embedding(vocab=d.vocab, width=d.width, context=d.context, position=d.position)
        x = layer.child("embed", embedding)(tokens, positions)
        mask, cache = _mask(segment_ids, cache)
        tables = tuple(block.mixer.table(positions) for block in d.pattern)
        caches = (None,) * len(d.pattern) if cache is None else cache.layers
        # The caches are carried, not scanned over: each layer writes its new tokens in place.
        (x, caches), streams = self._scan(layer)((x, caches), jnp.arange(d.repeats), tables, mask)
        if not d.tied:
            layer.child("unembed", Unembedding(vocab=d.vocab, width=d.width))()
        return Output(
            hidden=layer.child("final_norm", d.final_norm)(x),
            cache=None if cache is None else cache._replace(layers=caches),
            blocks=jnp.concatenate([streams.reshape(-1, *x.shape), x[None]]) if self.collect else None,
        )

    def _scan(self, layer: Layer) -> Layer:
        d, compute = self.decoder, layer.compute
        unroll = d.repeats if compute.unroll is None else min(compute.unroll, d.repeats)
        scan = nn.scan(
            compute.remat(Layer, in_loop=unroll < d.repeats),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=d.repeats,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        pattern = Pattern(blocks=d.pattern, collect=self.collect)
        return scan(spec=pattern, compute=compute, initial=layer.initial, name="layers")


def _mask(segment_ids: jax.Array, cache: Cache | None) -> tuple[Mask, Cache | None]:
    """What these tokens see, and the cache with their segments noted."""
    if cache is None:
        return Mask(segment_ids, segment_ids), None
    known = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    after = cache._replace(segment_ids=known, length=cache.length + segment_ids.shape[1])
    return Mask(segment_ids, known, cache.length), after
