"""Finds the class of transformers that computes what a decoder computes, or the value that no class supports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

from slmjax.convert.fold import FOLDS, Folded, Unfoldable, fold
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.models.families import FAMILIES
from slmjax.models.families.common.rows import Family
from slmjax.nn.attention import Attention
from slmjax.nn.block import AnyBlock, Block
from slmjax.nn.embedding import Logits
from slmjax.nn.mlp import GatedMLP, gelu_tanh, silu
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.numerics import Numerics
from slmjax.nn.position import Learned, NoPosition, Rope

NUMERICS = Numerics()
"""The numerics of stock transformers and llama.cpp"""
NONE = "no class of transformers computes exactly what this model does; known are: " + ", ".join(
    family.name for family in FAMILIES
)


class Expressed(NamedTuple):
    """A decoder and the class of transformers that computes it."""

    family: Family
    folded: Folded
    """The decoder as that class computes it: the given one, or the one left after folding scalars into the weights"""


def expressed(decoder: Assembly, numerics: Numerics = NUMERICS) -> Expressed:
    """The class of transformers that computes the same function, with as few scalars as possible folded into the
    weights. Only decoders have scalars that can be folded.

    Raises:
        UserError: there is no such class; the message names the value that no class supports.
    """
    for field in fields(Numerics):
        value = getattr(numerics, field.name)
        if value != getattr(NUMERICS, field.name):
            raise UserError(
                f"numerics.{field.name} is {_short(value)}, which no stock runtime computes: an export would be "
                "another model; train with the default numerics to export"
            )
    if not isinstance(decoder, Decoder):
        if family := _family(decoder):
            return Expressed(family=family, folded=Folded(decoder=decoder))
        raise UserError(NONE)
    needed, unfoldable = [], None
    for one in FOLDS:
        try:
            needed += [one] if fold(decoder, [one]).decoder != decoder else []
        except Unfoldable as e:
            unfoldable = unfoldable or str(e)
    for n in range(len(needed) + 1):
        for chosen in itertools.combinations(needed, n):
            folded = fold(decoder, chosen)
            family = _family(folded.decoder)
            if family is not None:
                return Expressed(family=family, folded=folded)
    for family in FAMILIES:
        if reason := family.refusal(decoder):
            raise UserError(reason)
    if unfoldable is not None:
        raise UserError(f"no class of transformers has {unfoldable}")
    whole = fold(decoder).decoder
    for name, value, without in _variations(whole):
        family = _family(without)
        if family is not None:
            raise UserError(
                f"no class of transformers has {name} = {value} in a model like this; {family.name} is nearest"
            )
    raise UserError(NONE)


def _family(decoder: Assembly) -> Family | None:
    mine = (family for family in FAMILIES if isinstance(decoder, family.kind))
    return next((family for family in mine if family.to_config(decoder) is not None), None)


def _variations(d: Decoder) -> Iterator[tuple[str, Any, Decoder]]:
    """Yields (field, its value, the decoder with a common value in that field instead)."""
    block, *more = (block for stage in d.stages for block in stage.pattern)
    if more:
        yield "layers", f"{1 + len(more)} kinds of block", replace(d, pattern=(block,), repeats=d.layers, tail=())
        return
    wired = Block(mixer=block.mixer, mlp=block.mlp, norm=block.norm)
    yield "block", type(block).__name__, replace(d, pattern=(wired,))
    common = {
        "position": (None, Learned()),
        "embed_norm": (None,),
        "table_width": (None,),
        "final_norm": (block.norm,),
        "logits": (Logits(),),
        "tied": (True, False),
        "head": (None,),
    }
    for name, values in common.items():
        for value in values:
            yield name, _short(getattr(d, name)), replace(d, **{name: value})
    parts = {
        "mixer": _mixers(block, d.width),
        "mlp": _mlps(block),
        "norm": ({"norm": kind} for kind in (RMSNorm(), LayerNorm())),
    }
    for part, changes in parts.items():
        for change in changes:
            name, value = next(iter(change.items()))
            old = block.norm if part == "norm" else getattr(getattr(block, part), name)
            new = value if part == "norm" else replace(getattr(block, part), **{name: value})
            final = {"final_norm": value} if part == "norm" and d.final_norm == block.norm else {}
            label = part if part == "norm" else f"{part}.{name}"
            yield label, _short(old), replace(d, pattern=(replace(block, **{part: new}),), **final)


def _mixers(block: AnyBlock, width: int) -> Iterator[dict[str, Any]]:
    mixer = block.mixer
    if not isinstance(mixer, Attention):
        return
    yield from ({name: None} for name in ("qk_norm", "softcap", "window"))
    yield from ({name: value} for name in ("qkv_bias", "o_bias") for value in (True, False))
    yield {"kv_heads": mixer.heads}
    yield {"causal": True}
    if width % mixer.heads == 0:
        yield {"head_dim": width // mixer.heads}
    yield from ({"position": value} for value in (Rope(), NoPosition()))


def _mlps(block: AnyBlock) -> Iterator[dict[str, Any]]:
    names = {field.name for field in fields(block.mlp)}  # pyright: ignore[reportArgumentType]
    usual = silu if isinstance(block.mlp, GatedMLP) else gelu_tanh
    yield from (
        {name: value} for name, value in (("activation", usual), ("bias", True), ("bias", False)) if name in names
    )


def _short(value: Any) -> str:
    """A value in a message of one line."""
    text = getattr(value, "__name__", None) or str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
