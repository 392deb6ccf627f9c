"""The one decoder, assembled from values: patterns of blocks, repeated, between an embedding and a final norm."""

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
from slmjax.nn.block import AnyBlock, Block
from slmjax.nn.compute import Compute
from slmjax.nn.embedding import Embedding, Logits, Projection, Unembedding
from slmjax.nn.layer import Declared, Initial, Layer
from slmjax.nn.parts import Flow, Norm
from slmjax.nn.position import Learned
from slmjax.tree import flatten
from slmjax.types import Model, Output, Params

__all__ = ["Block", "Cache", "Decoder", "Place", "Stage"]


class Cache(NamedTuple):
    """What generation remembers. Row b's token i lies in slot i, so rows of unequal length are padded on the left."""

    layers: Any  # a stage's mixers' own, stacked over its repeats: k, v [R, B, S, G, K]
    segment_ids: jax.Array  # int32 [B, S]: 0 where padding or still empty
    length: jax.Array  # int32 []: slots filled


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`pattern`, repeated `repeats` times, as one scan over layers."""

    pattern: tuple[AnyBlock, ...]
    repeats: int = 1

    def __post_init__(self):
        if not self.pattern:
            raise UserError("model.pattern: empty; give at least one Block")
        if self.repeats < 1:
            raise UserError(f"model.repeats: {self.repeats} is not positive")


class Place(NamedTuple):
    """The layers of one block of a pattern: where their parameters lie, and which layers of the model they are."""

    path: str
    """Prefix of their parameters' paths, `layers` or `layers/0`; the leading axis counts the repeats"""
    numbers: tuple[int, ...]
    """Number of the layer for each repeat"""
    block: AnyBlock


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The blocks that one iteration of the scan over layers runs."""

    blocks: tuple[AnyBlock, ...]
    collect: bool

    def __call__(
        self, layer: Layer, carry: tuple, depth: jax.Array, tables: tuple, mask: Mask
    ) -> tuple[tuple, jax.Array | None]:
        """(x [B, T, D], caches, shared) -> the same after these blocks, and the x before each if they are collected."""
        x, caches, shared = carry
        before, after = [], []
        for i, (block, table, cache) in enumerate(zip(self.blocks, tables, caches, strict=True)):
            before.append(x)
            args = (x, Flow(table, mask, cache, depth, shared))
            # A single block's parameters lie in layers/..., several blocks' in layers/0/..., layers/1/...
            x, flow = block(layer, *args) if len(self.blocks) == 1 else layer.child(str(i), block)(*args)
            after.append(flow.cache)
            shared = flow.shared
        return (x, tuple(after), shared), jnp.stack(before) if self.collect else None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal language model: `pattern`, `repeats` times, then the stages of `tail`."""

    vocab: int
    width: int
    pattern: tuple[AnyBlock, ...]
    repeats: int
    tail: tuple[Stage, ...] = ()
    """Layers of another pattern after those, where a model is not one pattern throughout"""
    context: int
    """Longest sequence in tokens"""
    tied: bool
    """Whether the unembedding reads the embedding's table"""
    final_norm: Norm | None
    position: Learned | None = None
    """Positions added to the embedding; rotary ones belong to each mixer"""
    embed_scale: float = 1.0
    """Factor on the token vectors"""
    embed_norm: Norm | None = None
    """Norm of what the first block reads"""
    table_width: int | None = None
    """Width of the tables, if it is not `width`: projections lie between (OPT-350m)"""
    logits: Logits = Logits()  # noqa: RUF009
    initial: Initial = Initial()  # noqa: RUF009
    """Initial values; `residual` is multiplied by 1/sqrt(2L) in `build`"""

    def __post_init__(self):
        for name in ("vocab", "width", "repeats", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: {getattr(self, name)} is not positive")
        if not self.pattern:
            raise UserError("model.pattern: empty; give at least one Block")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All layers."""
        return (Stage(pattern=self.pattern, repeats=self.repeats), *self.tail)

    @property
    def layers(self) -> int:
        """L"""
        return sum(len(stage.pattern) * stage.repeats for stage in self.stages)

    def places(self) -> tuple[Place, ...]:
        """Where the parameters of each layer lie."""
        found, first = [], 0
        for name, stage in zip(_names(self.stages), self.stages, strict=True):
            n = len(stage.pattern)
            for i, block in enumerate(stage.pattern):
                numbers = tuple(first + r * n + i for r in range(stage.repeats))
                found.append(Place(name if n == 1 else f"{name}/{i}", numbers, block))
            first += n * stage.repeats
        return tuple(found)

    def blocks(self) -> tuple[AnyBlock, ...]:
        """The block of each layer, in order."""
        by_number = {number: place.block for place in self.places() for number in place.numbers}
        return tuple(by_number[i] for i in range(self.layers))

    def build(self, compute: Compute = Compute()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays, computed as `compute` says."""
        modules = {collect: self._module(compute, collect) for collect in (False, True)}

        def init(key) -> Params:
            # Not as `compute` says: in one loop over layers this compiles sooner, in less memory, to the same values.
            return nn.meta.unbox(_init(self._module(Compute()), key))

        def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False) -> Output:
            output: Any = modules[collect].apply({"params": params}, tokens, positions, segment_ids, cache)
            return output

        def unembed(params, hidden):
            return self.logits(params["embed" if self.tied else "unembed"]["table"], hidden, compute)

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
        def stacked(stage: Stage) -> Any:
            each = tuple(block.mixer.init_cache(batch, length, dtype) for block in stage.pattern)
            return jax.tree.map(lambda x: jnp.zeros((stage.repeats, *x.shape), x.dtype), each)

        layers = tuple(stacked(stage) for stage in self.stages)
        return Cache(layers, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


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
        x = layer.child("embed", _embedding(d))(tokens, positions)
        mask, cache = _mask(segment_ids, cache)
        tables, made = [], {}
        for stage in d.stages:
            for mixer in (block.mixer for block in stage.pattern):
                if mixer.table_key not in made:
                    made[mixer.table_key] = mixer.table(positions)
            tables.append(tuple(made[block.mixer.table_key] for block in stage.pattern))
        shared = _shared(d, mask, layer.compute.dtype)
        after, streams = [], []
        for i, (name, stage) in enumerate(zip(_names(d.stages), d.stages, strict=True)):
            caches = (None,) * len(stage.pattern) if cache is None else cache.layers[i]
            # The caches are carried, not scanned over: each layer writes its new tokens in place.
            carry, before = self._scan(layer, name, stage)(
                (x, caches, shared), jnp.arange(stage.repeats), tables[i], mask
            )
            x, caches, shared = carry
            after.append(caches)
            streams.append(before)
        if not d.tied:
            layer.child("unembed", Unembedding(vocab=d.vocab, width=d.table_width or d.width))()
        hidden = x if d.final_norm is None else layer.child("final_norm", d.final_norm)(x)
        if d.table_width is not None:
            hidden = layer.child("project_out", Projection(width=d.table_width))(hidden)
        collected = [s.reshape(-1, *x.shape) for s in streams] if self.collect else []
        return Output(
            hidden=hidden,
            cache=None if cache is None else cache._replace(layers=tuple(after)),
            blocks=jnp.concatenate([*collected, x[None]]) if self.collect else None,
        )

    def _scan(self, layer: Layer, name: str, stage: Stage) -> Layer:
        compute = layer.compute
        unroll = stage.repeats if compute.unroll is None else min(compute.unroll, stage.repeats)
        scan = nn.scan(
            compute.remat(Layer, in_loop=unroll < stage.repeats),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=stage.repeats,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        pattern = Pattern(blocks=stage.pattern, collect=self.collect)
        return scan(spec=pattern, compute=compute, initial=layer.initial, name=name)


def _names(stages: tuple[Stage, ...]) -> tuple[str, ...]:
    return tuple("layers" if i == 0 else f"layers_{i}" for i in range(len(stages)))


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
    """What layers share, before the first of them: zeros, so that a scan can carry it."""
    batch, length = mask.key_segments.shape
    shared: dict[str, Any] = {}
    for block in d.blocks():
        shared |= block.mixer.init_shared(batch, length, dtype)
    return shared


def _mask(segment_ids: jax.Array, cache: Cache | None) -> tuple[Mask, Cache | None]:
    """What these tokens see, and the cache with their segments noted."""
    if cache is None:
        return Mask(segment_ids, segment_ids), None
    known = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    after = cache._replace(segment_ids=known, length=cache.length + segment_ids.shape[1])
    return Mask(segment_ids, known, cache.length), after
