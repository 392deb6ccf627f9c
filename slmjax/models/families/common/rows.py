"""Tables that map slmjax parameters ("ours") to the tensors of another format ("theirs"); `convert/` reads them in both
directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder


class Row(NamedTuple):
    """Parameters of slmjax <-> one tensor of the other format, for one layer: `pattern` leaves out our layer axis."""

    ours: str | tuple[str, ...]
    """Path(s) of our parameters. Several are concatenated along axis `split` of their tensor, or are its axis `n`"""
    theirs: str
    """Key of their tensor; `{}` stands for the layer number, `{each}` for the index on the axis `each`"""
    pattern: str
    """einops pattern, their tensor -> our parameter; export swaps the sides. If their tensor interleaves several of our
    parameters, the first axis of the right side is `n`, which counts them: "(h n k) d -> n d h k" """
    split: int | None = None
    """Axis of their tensor along which several of our parameters are concatenated"""
    each: str | None = None
    """Axis of our parameter that they split into one tensor for each index; the left side of `pattern` lacks it"""
    numbers: tuple[int, ...] | None = None
    """Number of their layer for each index of our layer axis; None: 0, 1, ... Set by `present`"""
    alias: str | None = None
    """Another key under which files may hold the tensor; read, never written"""


class StockModel(NamedTuple):
    """How stock `transformers` loads and runs an exported model. The defaults are those of a decoder."""

    loader: str = "AutoModelForCausalLM"
    """Class of transformers that loads the folder"""
    output: str = "logits"
    """Field of that class's output that equals the result of `Model.unembed`"""
    first: bool = False
    """Whether that field is computed for the first token of each sequence only"""
    last: bool = False
    """Whether that field is computed for the last token of each sequence only, the last that is not padding"""
    generates: bool = True
    """Whether the model generates text, so that greedily chosen tokens are compared"""
    pads: Literal["left", "right"] = "left"
    """The side of padding"""
    closes: bool = False
    """Whether the tokenizer appends EOS to a text, as to a whole document"""


def stock_decoder(decoder: Decoder) -> StockModel:
    """`Family.stock` of decoders: a language model, or a classifier that reads the last token that is not padding."""
    if not decoder.labels:
        return StockModel()
    return StockModel(loader="AutoModelForSequenceClassification", last=True, generates=False, pads="right")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one class of `transformers` and a model of slmjax that computes the same are converted into each other."""

    name: str
    """Display name, for messages and model cards"""
    model_type: str
    """`model_type` in config.json; empty if there is no published configuration"""
    rows: Callable[[Any], tuple[Row, ...]]
    """decoder -> rows; each parameter of the decoder is covered exactly once"""
    to_config: Callable[[Any], dict[str, Any] | None]
    """decoder -> config.json, or None where this class cannot express the decoder exactly"""
    from_config: Callable[[Mapping[str, Any]], Any]
    """config.json -> decoder. Raises UserError naming a field that is not supported"""
    kind: type[Assembly] = Decoder
    """Class of the models that the family describes"""
    stock: Callable[[Any], StockModel] = stock_decoder
    """decoder -> how stock transformers loads and runs its export"""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of keys in old files -> their current names"""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Keys that a file may hold as a copy of another tensor -> the key of that tensor"""
    unread: str | None = None
    """Regular expression of keys to ignore, as the class of transformers does"""
    sizes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Published sizes by name, as in `slmjax inspect llama/smollm2-135m`"""
    refusal: Callable[[Any], str | None] = lambda decoder: None
    """decoder -> why it cannot be exported, if the reason is a feature of this family; else None"""


def present(rows: tuple[Row, ...], decoder: Any) -> tuple[Row, ...]:
    """The rows whose parameters the decoder has, repeated for each place of the decoder. A family's table describes one
    block, `layers/...`, and lists all parameters that a model of the family may have."""
    paths, selected = frozenset(decoder.paths()), []
    for row in rows:
        ours = (row.ours,) if isinstance(row.ours, str) else row.ours
        if not ours[0].startswith("layers/"):
            selected += [row] if ours[0] in paths else []
            continue
        for place in decoder.places():
            moved = tuple(path.replace("layers", place.path, 1) for path in ours)
            if moved[0] in paths:
                placed = moved[0] if isinstance(row.ours, str) else moved
                selected.append(row._replace(ours=placed, numbers=place.numbers))
    return tuple(selected)


def table(rows: tuple[Row, ...]) -> Callable[[Any], tuple[Row, ...]]:
    """`Family.rows` of a family that has one table for all its models."""
    return partial(present, rows)


QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
QKV_BIAS = ("layers/attn/q_bias", "layers/attn/k_bias", "layers/attn/v_bias")
"""For rows whose tensor holds queries, keys and values"""


def norm_rows(ours: str, theirs: str, pattern: str = "d -> d") -> tuple[Row, ...]:
    """Gain and bias of a norm."""
    return Row(f"{ours}/scale", f"{theirs}.weight", pattern), Row(f"{ours}/bias", f"{theirs}.bias", pattern)


def dense_rows(ours: str, theirs: str, weight: str = "e d -> d e", bias: str = "e -> e") -> tuple[Row, ...]:
    """A matrix and its bias."""
    return Row(ours, f"{theirs}.weight", weight), Row(f"{ours}_bias", f"{theirs}.bias", bias)


def out_rows(theirs: str) -> tuple[Row, ...]:
    """The output projection of attention, and its bias."""
    return dense_rows("layers/attn/o", theirs, "e (h k) -> h k e")


def attention_rows(layer: str, q: str, k: str, v: str, o: str) -> tuple[Row, ...]:
    """The four projections of attention and their biases, with these names below `layer`."""
    heads = zip(QKV, (q, k, v), strict=True)
    each = (dense_rows(ours, f"{layer}.{name}", "(h k) d -> d h k", "(h k) -> h k") for ours, name in heads)
    return (*(row for rows in each for row in rows), *out_rows(f"{layer}.{o}"))
