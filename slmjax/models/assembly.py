"""The base of decoders and encoders: layers in stages, each a pattern of blocks, and the paths of their parameters."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_kernels import Mask, Scores
from slmjax.nn.block import AnyBlock
from slmjax.nn.compute import Compute
from slmjax.nn.initial import Initial, Normal
from slmjax.nn.layer import COLLECTED, Declared, Layer
from slmjax.nn.numerics import Numerics
from slmjax.nn.parts import Flow
from slmjax.traced import TRACED
from slmjax.tree import flatten
from slmjax.types import Batch, Key, Model, Output, Params


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
    """The layers that repeat one block of a pattern: the path of their parameters, and their indices in the model."""

    path: str
    """Prefix of their parameters' paths, `layers` or `layers/0`; the leading axis of a parameter is that of repeats"""
    numbers: tuple[int, ...]
    """Index of the layer for each repeat, from 0"""
    block: AnyBlock


class Carry(NamedTuple):
    """The values that one layer passes to the next."""

    x: Any
    """The residual stream [B, T, D]"""
    caches: Any
    """Caches of all layers: for each stage a tuple with one cache for each block of its pattern; inside a stage, the
    tuple of that stage"""
    shared: dict[str, Any]
    """`Flow.shared`"""
    auxiliary: dict[str, Any]
    """`Flow.auxiliary`"""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The blocks that one iteration of the scan over layers runs."""

    blocks: tuple[AnyBlock, ...]
    collect: bool

    def __call__(
        self, layer: Layer, carry: Carry, depth: jax.Array, tables: tuple, mask: Mask
    ) -> tuple[Carry, jax.Array | None]:
        """`carry` after these blocks, and with `collect` the x before each of them, else None."""
        x, caches, shared, auxiliary = carry
        before, after = [], []
        for i, (block, table, cache) in enumerate(zip(self.blocks, tables, caches, strict=True)):
            before.append(x)
            args = (x, Flow(table, mask, cache, depth, shared, auxiliary))
            # A single block's parameters lie in layers/..., several blocks' in layers/0/..., layers/1/...
            x, flow = block(layer, *args) if len(self.blocks) == 1 else layer.child(str(i), block)(*args)
            after.append(flow.cache)
            shared, auxiliary = flow.shared, flow.auxiliary
        return Carry(x, tuple(after), shared, auxiliary), jnp.stack(before) if self.collect else None


@dataclass(frozen=True, kw_only=True)
class Assembly(abc.ABC):
    """A model: an embedding, `pattern` repeated `repeats` times, the stages of `tail`, and an output layer."""

    vocab: int
    """V"""
    width: int
    """D"""
    pattern: tuple[AnyBlock, ...]
    repeats: int
    tail: tuple[Stage, ...] = ()
    """Further layers of other patterns, for a model that is not one pattern throughout"""
    context: int
    """Longest sequence in tokens"""
    initial: Initial = field(default=Normal(), metadata=TRACED)
    """Initial values"""
    causal: ClassVar[bool]
    """Whether no token sees a later one (a causal model); only then is the mean loss the negative log-likelihood of a
    text, from which bits per byte follow"""

    def __post_init__(self):
        for name in ("vocab", "width", "repeats", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: {getattr(self, name)} is not positive")
        if not self.pattern:
            raise UserError("model.pattern: empty; give at least one Block")
        self.initial.check()

    @abc.abstractmethod
    def build(self, compute: Compute = Compute(), numerics: Numerics = Numerics()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays: `numerics` is what they compute, `compute` how."""

    @abc.abstractmethod
    def drawn(self, key: jax.Array) -> Params:
        """Initial parameters, each in its `Declared`."""

    @abc.abstractmethod
    def logit_products(self) -> int:
        """Multiply-adds that compute a token's logits from tables (`flops.TABLES`), for counting FLOPs."""

    @abc.abstractmethod
    def evaluation_batch(self, batch: Batch, key: Key, special: Any) -> Batch:
        """`batch` with the inputs, targets and weights on which a model of this kind is evaluated. `special`: the
        special token ids of the tokenizer (`types.Special`)."""

    @property
    @abc.abstractmethod
    def example(self) -> str:
        """An example command for a trained model of this kind, with {} in the place of MODEL"""

    @property
    def predicts_tokens(self) -> bool:
        """Whether its outputs are logits over its vocabulary."""
        return True

    def no_auxiliary(self, segment_ids: jax.Array) -> dict[str, jax.Array]:
        """The initial auxiliary outputs, before the first layer: zeros, since a scan needs their shapes."""
        names = {name: None for block in self.blocks() for name in block.auxiliary}
        return {name: jnp.zeros(segment_ids.shape, jnp.float32) for name in names}

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it scores a text for; empty if it is no classifier"""
        return ()

    @property
    def reads_end(self) -> bool:
        """Whether it expects EOS at the end of a whole text, as encoders do."""
        return False

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
        places, first = [], 0
        for name, stage in zip(stage_names(self.stages), self.stages, strict=True):
            n = len(stage.pattern)
            for i, block in enumerate(stage.pattern):
                numbers = tuple(first + r * n + i for r in range(stage.repeats))
                places.append(Place(name if n == 1 else f"{name}/{i}", numbers, block))
            first += n * stage.repeats
        return tuple(places)

    def blocks(self) -> tuple[AnyBlock, ...]:
        """The block of each layer, in order."""
        by_number = {number: place.block for place in self.places() for number in place.numbers}
        return tuple(by_number[i] for i in range(self.layers))

    def rules(self) -> tuple[Scores | None, ...]:
        """How the attention scores of each layer follow from its queries and keys; None for one without attention."""
        return tuple(block.mixer.rule for block in self.blocks())

    def declared(self) -> Params:
        """The parameter tree, its leaves `Declared`: abstract `value`, logical axes `names`, distribution `initial`."""
        return jax.tree.map(lambda p: p, self._declared, is_leaf=is_declared)

    @functools.cached_property
    def _declared(self) -> Params:
        """Found once for each model: it takes as long as tracing the model."""
        return jax.eval_shape(self.drawn, jax.random.key(0))

    def paths(self) -> tuple[str, ...]:
        """The path of each parameter."""
        return tuple(flatten(self.declared(), is_leaf=is_declared))

    def axes(self) -> Any:
        """The tree of parameters, each leaf its logical axes (`Model.axes`)."""
        return jax.tree.map(lambda p: p.names, self.declared(), is_leaf=is_declared)


def is_declared(x: Any) -> bool:
    """Whether x is a parameter wrapped in `Declared`."""
    return isinstance(x, Declared)


def stage_names(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The prefix of the paths of each stage's parameters."""
    return tuple("layers" if i == 0 else f"layers_{i}" for i in range(len(stages)))


def applied(assembly: Assembly, module: Layer, params: Params, *args: Any, collect: bool) -> Output:
    """`module.apply` with these parameters and arguments, and with `collect` the layers' queries, keys and values."""
    output: Any
    if not collect:
        output = module.apply({"params": params}, *args)
        return output
    output, kept = module.apply({"params": params}, *args, mutable=[COLLECTED])
    found: dict[int, Any] = {}
    for place in assembly.places():
        inside: Any = kept.get(COLLECTED, {})
        for key in (*place.path.split("/"), place.block.mixer.label):
            inside = inside.get(key, {})
        for repeat, number in enumerate(place.numbers):
            found[number] = {name: x[repeat] for name, x in inside.items()} or None
    return output._replace(attention=tuple(found[i] for i in range(assembly.layers)))


def run(
    layer: Layer, stages: Sequence[Stage], positions: jax.Array, mask: Mask, carry: Carry, collect: bool
) -> tuple[Carry, list[jax.Array]]:
    """Runs all layers: the carry after them, and with `collect` the inputs of each stage's blocks [R * P, B, T, D]."""
    caches = carry.caches
    tables: dict[Any, Any] = {}  # `Mixer.table` of the positions: each is computed once for all layers
    for block in (block for stage in stages for block in stage.pattern):
        if block.mixer.table_key not in tables:
            tables[block.mixer.table_key] = block.mixer.table(positions)
    after, streams = [], []
    for name, stage, of_stage in zip(stage_names(stages), stages, caches, strict=True):
        # The caches are carried, not scanned over: each layer writes its new tokens in place.
        of_blocks = tuple(tables[block.mixer.table_key] for block in stage.pattern)
        scanned = _scan(layer, name, stage, collect)
        carry, before = scanned(carry._replace(caches=of_stage), jnp.arange(stage.repeats), of_blocks, mask)
        after.append(carry.caches)
        streams += [before.reshape(-1, *carry.x.shape)] if collect else []
    return carry._replace(caches=tuple(after)), streams


def _scan(layer: Layer, name: str, stage: Stage, collect: bool) -> Layer:
    compute = layer.compute
    unroll = stage.repeats if compute.unroll is None else min(compute.unroll, stage.repeats)
    scan = nn.scan(
        compute.remat(Layer, in_loop=unroll < stage.repeats),
        variable_axes={"params": 0, COLLECTED: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=stage.repeats,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    pattern = Pattern(blocks=stage.pattern, collect=collect)
    return scan(spec=pattern, name=name, **layer.inherited)
