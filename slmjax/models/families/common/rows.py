"""Rows that tie our parameters to those of another format. `convert/` reads them in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder


class Row(NamedTuple):
    """Ours <-> theirs, for one layer: the leading layer axis of ours is left out of `pattern`."""

    ours: str | tuple[str, ...]
    """Path(s) of ours. Several lie one after another along axis `split` of theirs, or are its axis `n`."""
    theirs: str
    """Their key; `{}` stands for the layer number, `{each}` for the index on the axis `each`"""
    pattern: str
    """einops, theirs -> ours; export swaps the sides. Where several of ours lie interleaved in theirs, the first axis
    of the right side is `n`, which counts them: "(h n k) d -> n d h k" """
    split: int | None = None
    """Axis of theirs along which several of ours are concatenated"""
    each: str | None = None
    """An axis of ours for each index of which theirs has a tensor of its own; the left side lacks it"""
    numbers: tuple[int, ...] | None = None
    """Number of their layer for each of ours; None: 0, 1, ... `present` sets it"""
    alias: str | None = None
    """Another key under which files hold it; read, never written"""


class StockModel(NamedTuple):
    """How stock `transformers` loads and runs an exported model. The defaults are those of a decoder."""

    loader: str = "AutoModelForCausalLM"
    """Name of the class that loads the folder"""
    output: str = "logits"
    """The field of its answer that is what `Model.unembed` gives"""
    first: bool = False
    """Whether that tells of the first token of each sequence alone"""
    last: bool = False
    """Whether that tells of the last token of each sequence alone, which is the last one that is not padding"""
    generates: bool = True
    """Whether it goes on from prompts, so that greedily chosen tokens are compared"""
    pads: Literal["left", "right"] = "left"
    """Where padding stands"""
    closes: bool = False
    """Whether a text is encoded with EOS behind it, as a whole document"""


def stock_decoder(decoder: Decoder) -> StockModel:
    """A model for words, or a classifier, which stock transformers reads at the last token that is not padding."""
    if not decoder.labels:
        return StockModel()
    return StockModel(loader="AutoModelForSequenceClassification", last=True, generates=False, pads="right")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model of `transformers` and a model of ours say the same thing."""

    name: str
    """Human name, for messages and model cards"""
    model_type: str
    """`model_type` in config.json; empty if nobody has published one"""
    rows: Callable[[Any], tuple[Row, ...]]
    """decoder -> rows; each parameter of the decoder is covered exactly once"""
    to_config: Callable[[Any], dict[str, Any] | None]
    """decoder -> config.json, or None where this class cannot express the decoder exactly"""
    from_config: Callable[[Mapping[str, Any]], Any]
    """config.json -> decoder. Raises UserError naming the field that has no counterpart"""
    kind: type[Assembly] = Decoder
    """What assembles the models that it describes"""
    stock: Callable[[Any], StockModel] = stock_decoder
    """decoder -> how stock transformers is compared with it"""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Pieces of keys in old files -> what they are called now"""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Keys that may stand in a file as a copy of another's tensor"""
    unread: str | None = None
    """Regular expression of keys that the class of transformers does not read either"""
    sizes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Published sizes by the name that `slmjax inspect` takes: "llama/smollm2-135m" """
    refusal: Callable[[Any], str | None] = lambda decoder: None
    """decoder -> what of it no class of stock transformers has, if this family is known for it; else None"""


def present(rows: tuple[Row, ...], decoder: Any) -> tuple[Row, ...]:
    """The rows whose parameters exist, written out for each place of the decoder: a family's table is written for one
    block, `layers/...`, and lists all that it can have."""
    paths, found = frozenset(decoder.paths()), []
    for row in rows:
        ours = (row.ours,) if isinstance(row.ours, str) else row.ours
        if not ours[0].startswith("layers/"):
            found += [row] if ours[0] in paths else []
            continue
        for place in decoder.places():
            moved = tuple(path.replace("layers", place.path, 1) for path in ours)
            if moved[0] in paths:
                placed = moved[0] if isinstance(row.ours, str) else moved
                found.append(row._replace(ours=placed, numbers=place.numbers))
    return tuple(found)


def table(rows: tuple[Row, ...]) -> Callable[[Any], tuple[Row, ...]]:
    """`Family.rows` of a family that has one table for all its models."""
    return partial(present, rows)


QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
QKV_BIAS = ("layers/attn/q_bias", "layers/attn/k_bias", "layers/attn/v_bias")
"""For rows of tensors that hold the three"""


def norm_rows(ours: str, theirs: str, pattern: str = "d -> d") -> tuple[Row, ...]:
    """Gain and bias of a norm."""
    return Row(f"{ours}/scale", f"{theirs}.weight", pattern), Row(f"{ours}/bias", f"{theirs}.bias", pattern)


def dense_rows(ours: str, theirs: str, weight: str = "e d -> d e", bias: str = "e -> e") -> tuple[Row, ...]:
    """A matrix and its bias."""
    return Row(ours, f"{theirs}.weight", weight), Row(f"{ours}_bias", f"{theirs}.bias", bias)


def out_rows(theirs: str) -> tuple[Row, ...]:
    """What attention puts its heads together with."""
    return dense_rows("layers/attn/o", theirs, "e (h k) -> h k e")


def attention_rows(layer: str, q: str, k: str, v: str, o: str) -> tuple[Row, ...]:
    """Attention whose four parts have these names below `layer`."""
    heads = zip(QKV, (q, k, v), strict=True)
    found = (dense_rows(ours, f"{layer}.{name}", "(h k) d -> d h k", "(h k) -> h k") for ours, name in heads)
    return (*(row for rows in found for row in rows), *out_rows(f"{layer}.{o}"))
