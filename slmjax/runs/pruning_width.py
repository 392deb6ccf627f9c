"""Narrower models: fewer hidden channels, heads or channels of the residual stream, by the size of activations.

References:
    Muralidharan et al. 2024 (Minitron), arXiv:2407.14679
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slmjax import tree
from slmjax.compress.prune.structured import channel_importance, most_important, most_important_heads
from slmjax.compress.quant.blocks import sides
from slmjax.convert.expressed import expressed
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.models.slicing import keep_heads, keep_hidden, keep_width
from slmjax.nn.attention import Attention
from slmjax.runs.calibrating import grams
from slmjax.runs.pruning_parts import Progress, Pruning, as_numpy, decoder_of, left
from slmjax.types import Batch, Params


@dataclass(frozen=True, kw_only=True)
class Hidden(Pruning):
    """Leaves out the hidden channels of each feed-forward layer with the smallest activations."""

    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        decoder, found, hidden = decoder_of(model), grams(model, params, batches), []
        for number, (path, index) in enumerate(_layers(decoder), start=1):
            importance = found.importance(f"{path}/mlp/down")[index]
            hidden.append(most_important(importance, left(len(importance), self.sparsity, "hidden channels")))
            progress("layers", number, model.layers)
        return as_numpy(*keep_hidden(decoder, params, hidden))


@dataclass(frozen=True, kw_only=True)
class Heads(Pruning):
    """Leaves out, in each layer, the groups of query heads that share keys and values with the shortest outputs. The
    number of groups that are left is the nearest one to `sparsity` whose model a class of `transformers` computes."""

    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        decoder = decoder_of(model)
        mixer = decoder.blocks()[0].mixer
        if not isinstance(mixer, Attention) or any(block.mixer != mixer for block in decoder.blocks()):
            raise UserError("--width heads: not all layers of this model have the same attention; use --width ff")
        groups, size = mixer.kv_heads, mixer.heads // mixer.kv_heads
        keep = exported_size(
            left(groups, self.sparsity, "groups of heads that share keys and values"),
            groups,
            lambda n: _with_heads(decoder, n * size, n),
        )
        found, heads = grams(model, params, batches), []
        for number, (path, index) in enumerate(_layers(decoder), start=1):
            importance = found.head_importance(f"{path}/{mixer.label}/o")[index]
            heads.append(most_important_heads(importance, groups, keep=keep * size, keep_kv=keep))
            progress("layers", number, model.layers)
        return as_numpy(*keep_heads(decoder, params, heads))


@dataclass(frozen=True, kw_only=True)
class Channels(Pruning):
    """Leaves out the channels of the residual stream with the smallest activations after the norms, summed over all
    norms. The number of those left is the nearest one to `sparsity` whose model a class of `transformers` computes:
    for most a multiple of the number of heads.

    Norms take their statistics over the channels that are left, so the result is not the whole model with zeros in the
    other channels, but that with norms that divide by the number of channels left (`models.slicing.keep_width`).
    """

    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        decoder, squares = decoder_of(model), np.zeros(model.width)

        def last_norm(hidden: Any) -> None:  # [B, T, D]
            np.add(squares, np.square(np.asarray(channel_importance(hidden), np.float64)), out=squares)

        keep = exported_size(
            left(decoder.width, self.sparsity, "channels of the residual stream"),
            decoder.width,
            lambda n: replace(decoder, width=n),
        )
        found = grams(model, params, batches, hidden=last_norm)
        importance = np.sqrt(squares)
        readers = _readers(decoder)
        for done, path in enumerate(readers, start=1):
            importance += found.importance(path).sum(axis=0)
            progress("norms", done, len(readers))
        return as_numpy(*keep_width(decoder, params, most_important(importance, keep)))


WIDTHS: Mapping[str, Callable[..., Pruning]] = {"ff": Hidden, "heads": Heads, "model": Channels}
"""What `slmjax prune --method width --width` takes"""


def _layers(decoder: Decoder) -> Sequence[tuple[str, int]]:
    """Of each layer, the path of its stack and its index in it."""
    places = {number: (place.path, i) for place in decoder.places() for i, number in enumerate(place.numbers)}
    return [places[number] for number in range(decoder.layers)]


def _readers(decoder: Decoder) -> list[str]:
    """For each norm, the path of one of the matrices that multiply its output: the first of a mixer, of an MLP."""
    first: dict[str, str] = {}
    for path, axes in tree.flatten(decoder.axes(), is_leaf=tree.is_axes).items():
        if not path.startswith("layers") or "embed" not in axes or "tap" in axes or len(axes) < 3:
            continue
        if tuple(axes[i] for i in sides(axes, path).inputs) == ("embed",):
            first.setdefault(path.rpartition("/")[0], path)
    return list(first.values())


def _with_heads(decoder: Decoder, heads: int, kv_heads: int) -> Decoder:
    def of(block: Any) -> Any:
        return replace(block, mixer=replace(block.mixer, heads=heads, kv_heads=kv_heads))

    tail = tuple(replace(stage, pattern=tuple(map(of, stage.pattern))) for stage in decoder.tail)
    return replace(decoder, pattern=tuple(map(of, decoder.pattern)), tail=tail)


def exported_size(wanted: int, of: int, smaller: Callable[[int], Decoder]) -> int:
    """The number nearest to `wanted`, from 1 to `of` - 1, whose model is expressed in a class of transformers; `wanted`
    if there is none, or if the model as it is has no such class."""
    numbers = sorted(range(1, of), key=lambda n: (abs(n - wanted), n)) if _has_class(smaller(of)) else []
    return next((n for n in numbers if _has_class(smaller(n))), wanted)


def _has_class(decoder: Decoder) -> bool:
    try:
        expressed(decoder)
    except UserError:
        return False
    return True
