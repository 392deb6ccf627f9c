"""Smaller decoders cut out of larger ones: fewer layers, hidden channels, heads, or channels of the residual stream.

Each function takes a decoder and its parameters and returns those of the smaller model, a decoder like any other.
`compress.prune.structured` says which parts to keep. Where all layers keep equally many channels and heads, the model
stays uniform, one scan over its layers, and is exported like the one that it was cut from. Where they do not, layers of
different shapes become stages of their own, and no class of `transformers` has that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from slmjax import tree
from slmjax.compress.prune.structured import groups_of
from slmjax.errors import UserError
from slmjax.models.arrange import layers_of
from slmjax.models.assembly import is_declared
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Attention, SharedAttention
from slmjax.nn.block import AnyBlock
from slmjax.nn.mlp import MLP, GatedMLP
from slmjax.nn.position import Alibi
from slmjax.types import Params


class One(NamedTuple):
    """A layer by itself."""

    block: AnyBlock
    params: dict[str, Any]
    """By path inside the layer"""
    axes: dict[str, tuple[str | None, ...]]


def keep_layers(decoder: Decoder, params: Params, layers: Sequence[int]) -> tuple[Decoder, Params]:
    """The model of these layers (ascending, from 0), without the others.

    Raises:
        UserError: an index is wrong, or layers share keys and values.
    """
    if any(isinstance(block.mixer, SharedAttention) for block in decoder.blocks()):
        raise UserError("layers: layers of this model use the keys and values of others, so none can be left out")
    rest, ones = _unstacked(decoder, params)
    return _restacked(decoder, rest, [ones[i] for i in _indices("layers", layers, decoder.layers)])


def keep_hidden(decoder: Decoder, params: Params, hidden: Sequence[Sequence[int]]) -> tuple[Decoder, Params]:
    """The model with these hidden channels (ascending, from 0) of each feed-forward layer.

    Raises:
        UserError: an index is wrong, or a feed-forward layer is of another kind than MLP and GatedMLP.
    """
    rest, ones = _unstacked(decoder, params)
    new = []
    for i, (one, kept) in enumerate(zip(ones, _each("hidden", hidden, ones), strict=True)):
        mlp = one.block.mlp
        if not isinstance(mlp, MLP | GatedMLP):
            raise UserError(f"hidden: the feed-forward layer of layer {i} is {type(mlp).__name__}, not MLP or GatedMLP")
        kept = _indices(f"hidden[{i}]", kept, mlp.hidden)
        block = replace(one.block, mlp=replace(mlp, hidden=len(kept)))
        new.append(_taken(one, block, "mlp/", {"mlp": kept}))
    return _restacked(decoder, rest, new)


def keep_heads(decoder: Decoder, params: Params, heads: Sequence[Sequence[int]]) -> tuple[Decoder, Params]:
    """The model with these query heads (ascending, from 0) of each layer, and the keys and values that they read.

    Raises:
        UserError: an index is wrong; heads that share keys and values are not kept in equal numbers; or a mixer is not
            an attention whose heads can be left out.
    """
    rest, ones = _unstacked(decoder, params)
    new = []
    for i, (one, kept) in enumerate(zip(ones, _each("heads", heads, ones), strict=True)):
        mixer = one.block.mixer
        if not isinstance(mixer, Attention) or mixer.shares is not None or isinstance(mixer.position, Alibi):
            raise UserError(f"heads: layer {i} is no attention with keys and values of its own and equal heads")
        kept = _indices(f"heads[{i}]", kept, mixer.heads)
        groups = groups_of(kept, mixer.heads, mixer.kv_heads)
        block = replace(one.block, mixer=replace(mixer, heads=len(kept), kv_heads=len(groups)))
        new.append(_taken(one, block, f"{mixer.label}/", {"heads": kept, "kv_heads": groups}))
    return _restacked(decoder, rest, new)


def keep_width(decoder: Decoder, params: Params, channels: Sequence[int]) -> tuple[Decoder, Params]:
    """The model with these channels (ascending, from 0) of the residual stream, in every table, matrix and norm.

    Its norms take their statistics over the channels that are left. The model computes what the larger one would with
    zeros in the other channels and norms that divide by the number of those left, not by D.

    Raises:
        UserError: an index is wrong, or the width of some part cannot be changed.
    """
    if decoder.table_width is not None:
        raise UserError(f"channels: the embedding table has a width of its own ({decoder.table_width}); not supported")
    kept = jnp.asarray(_indices("channels", channels, decoder.width))
    axes = tree.flatten(decoder.axes(), is_leaf=tree.is_axes)
    new = tree.map_with_path(lambda path, x: _take(x, axes[path], {"embed": kept}), params)
    return _checked(replace(decoder, width=len(kept)), new)


def _unstacked(decoder: Decoder, params: Params) -> tuple[dict[str, Any], list[One]]:
    """The parameters outside the layers, by path, and each layer."""
    flat, axes = tree.flatten(params), tree.flatten(decoder.axes(), is_leaf=tree.is_axes)
    ones, inside = {}, set()
    for place in decoder.places():
        paths = [path for path in flat if path.startswith(f"{place.path}/")]
        inside |= set(paths)
        names = {path: path.removeprefix(f"{place.path}/") for path in paths}
        for repeat, number in enumerate(place.numbers):
            ones[number] = One(
                place.block,
                {names[path]: flat[path][repeat] for path in paths},
                {names[path]: axes[path][1:] for path in paths},
            )
    return {path: x for path, x in flat.items() if path not in inside}, [ones[i] for i in range(decoder.layers)]


def _restacked(decoder: Decoder, rest: dict[str, Any], ones: Sequence[One]) -> tuple[Decoder, Params]:
    """The inverse of `_unstacked`."""
    new: Decoder = replace(decoder, **layers_of([one.block for one in ones]))
    flat = dict(rest)
    for place in new.places():
        for name in ones[place.numbers[0]].params:
            flat[f"{place.path}/{name}"] = jnp.stack([ones[number].params[name] for number in place.numbers])
    return _checked(new, tree.unflatten(flat))


def _taken(one: One, block: AnyBlock, inside: str, kept: dict[str, Sequence[int]]) -> One:
    """A layer with these entries of the axes of its parameters whose path begins with `inside`."""
    wanted = {name: jnp.asarray(indices) for name, indices in kept.items()}
    params = {
        name: _take(x, one.axes[name], wanted) if name.startswith(inside) else x for name, x in one.params.items()
    }
    return One(block, params, one.axes)


def _take(x: Any, axes: tuple[str | None, ...], kept: dict[str, Any]) -> Any:
    for dimension, name in enumerate(axes):
        if name in kept:
            x = jnp.take(x, kept[name], axis=dimension)
    return x


def _checked(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The two, if they fit each other."""
    declared = {path: p.value.shape for path, p in tree.flatten(decoder.declared(), is_leaf=is_declared).items()}
    given = {path: x.shape for path, x in tree.flatten(params).items()}
    wrong = [path for path in declared.keys() | given.keys() if declared.get(path) != given.get(path)]
    if wrong:
        path = min(wrong)
        raise UserError(
            f"{path} would have the shape {given.get(path)} and needs {declared.get(path)}: this part of the model "
            "cannot be cut in this way"
        )
    return decoder, params


def _each(name: str, given: Sequence[Sequence[int]], ones: Sequence[One]) -> Sequence[Sequence[int]]:
    if len(given) != len(ones):
        raise UserError(f"{name} has {len(given)} entries; expected one for each of the {len(ones)} layers")
    return given


def _indices(name: str, given: Sequence[int], size: int) -> tuple[int, ...]:
    kept = tuple(int(i) for i in given)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise UserError(f"{name} is {list(kept)}; expected ascending indices, at least one, from 0 to {size - 1}")
    return kept
