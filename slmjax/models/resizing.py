"""The same kind of decoder with other sizes: its width, and everything that goes with it, or its depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Queries
from slmjax.nn.block import AnyBlock
from slmjax.nn.mlp import MLP, GatedMLP
from slmjax.nn.short_conv import ShortConv


def resized(model: Decoder, *, width: int, layers: int) -> Decoder:
    """The model with another width and depth.

    Heads, hidden channels and the channels of convolutions grow like the width, rounded to whole numbers of at least 1;
    the width of a head and the number of queries that share keys and values stay. Multipliers and initial values stay.

    Raises:
        UserError: a part is of a kind whose sizes are not known, or the layers are no multiple of the model's pattern.
    """
    ratio = width / model.width
    if model.tail:
        raise UserError("model.tail: the depth of a model of several stages does not follow from a number of layers")
    if layers % len(model.pattern):
        raise UserError(f"layers: {layers} is no multiple of the {len(model.pattern)} layers of model.pattern")
    return replace(
        model,
        width=width,
        table_width=None if model.table_width is None else _times(model.table_width, ratio),
        pattern=tuple(_widened(block, ratio) for block in model.pattern),
        repeats=layers // len(model.pattern),
    )


def _widened(block: AnyBlock, ratio: float) -> AnyBlock:
    mixer: Any = block.mixer
    if isinstance(mixer, Queries):
        groups = _times(mixer.kv_heads, ratio)
        mixer = replace(mixer, heads=groups * (mixer.heads // mixer.kv_heads), kv_heads=groups)
    elif isinstance(mixer, ShortConv):
        mixer = replace(mixer, channels=_times(mixer.channels, ratio))
    else:
        raise UserError(f"model.pattern: how {type(mixer).__name__} grows with the width is not known")
    if not isinstance(block.mlp, MLP | GatedMLP):
        raise UserError(f"model.pattern: how {type(block.mlp).__name__} grows with the width is not known")
    return replace(block, mixer=mixer, mlp=replace(block.mlp, hidden=_times(block.mlp.hidden, ratio)))


def _times(n: int, ratio: float) -> int:
    return max(1, round(n * ratio))
