"""What the families of encoders have in common: their classes in `transformers`, one for each head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slmjax.errors import UserError
from slmjax.models.encoder import Encoder
from slmjax.models.hf_config import Fields
from slmjax.models.table import Asked, Row
from slmjax.nn.block import PostNorm
from slmjax.nn.heads import Bare, Classifier, Head, MaskedWords, Pooler

GREEK = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files older than 2019, as `transformers` renames them"""


class Kind(NamedTuple):
    """A class of `transformers`, for a kind of head."""

    architecture: str
    prefix: str
    """Of the keys of the encoder inside it"""
    head: type[Head]
    output: str
    """The field of its answer that `unembed` gives"""
    first: bool
    """Whether it tells of the first token of each sequence alone"""


def kinds(name: str, prefix: str, *, pooler: bool) -> tuple[Kind, ...]:
    """The classes `{name}ForMaskedLM` and so on."""
    words = Kind(f"{name}ForMaskedLM", prefix, MaskedWords, "logits", False)
    if not pooler:
        return words, Kind(f"{name}Model", "", Bare, "last_hidden_state", False)
    return (
        words,
        Kind(f"{name}Model", "", Pooler, "pooler_output", True),
        Kind(f"{name}ForSequenceClassification", prefix, Classifier, "logits", True),
    )


def kind_of(known: tuple[Kind, ...], encoder: Encoder) -> Kind | None:
    """The class that has the head of this encoder."""
    return next((kind for kind in known if kind.head is type(encoder.head)), None)


def asked(known: tuple[Kind, ...]) -> Callable[[Encoder], Asked]:
    """How stock transformers is asked for what an encoder tells."""

    def of(encoder: Encoder) -> Asked:
        kind = kind_of(known, encoder)
        assert kind is not None
        return Asked(
            loader=kind.architecture, output=kind.output, first=kind.first, generates=False, pads="right", closes=True
        )

    return of


def head_of(known: tuple[Kind, ...], config: Mapping[str, Any], words: MaskedWords) -> Head:
    """The head of the class that a config.json names; `words` if that is the one for masked words.

    Raises:
        UserError: it names none, or another.
    """
    names = config.get("architectures") or [None]
    found = next((kind for kind in known if kind.architecture == names[0]), None)
    if found is None:
        raise UserError(
            f"config.json: architectures = {names[0]!r} is not supported; there are "
            f"{', '.join(kind.architecture for kind in known)}"
        )
    if config.get("is_decoder"):
        raise UserError("config.json: is_decoder = True is not supported; only False is")
    if found.head is Classifier:
        return Classifier(labels=_labels(config))
    return words if found.head is MaskedWords else found.head()


def head_fields(encoder: Encoder) -> dict[str, Any]:
    """What config.json says of the head."""
    if not isinstance(encoder.head, Classifier):
        return {}
    names = encoder.head.labels
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {x: i for i, x in enumerate(names)}}


def ignore_dropout(fields: Fields, *names: str) -> None:
    """Takes probabilities that matter in training with `transformers` alone."""
    for name in names:
        fields.take(name, (float, int), 0.0)


def plain(encoder: Any) -> bool:
    """Whether this is an encoder of one kind of post-norm block."""
    one = isinstance(encoder, Encoder) and len(encoder.pattern) == 1 and not encoder.tail
    return one and isinstance(encoder.pattern[0], PostNorm)


def attention_rows(layer: str, q: str, k: str, v: str, o: str) -> tuple[Row, ...]:
    """Rows of attention whose four parts have these names below `layer`."""
    found = [
        row
        for ours, theirs in (("q", q), ("k", k), ("v", v))
        for row in (
            Row(f"layers/attn/{ours}", f"{layer}.{theirs}.weight", "(h k) d -> d h k"),
            Row(f"layers/attn/{ours}_bias", f"{layer}.{theirs}.bias", "(h k) -> h k"),
        )
    ]
    return (
        *found,
        Row("layers/attn/o", f"{layer}.{o}.weight", "d (h k) -> h k d"),
        Row("layers/attn/o_bias", f"{layer}.{o}.bias", "d -> d"),
    )


def norm_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a norm."""
    return Row(f"{ours}/scale", f"{theirs}.weight", "d -> d"), Row(f"{ours}/bias", f"{theirs}.bias", "d -> d")


def dense_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a matrix and its bias."""
    return Row(ours, f"{theirs}.weight", "e d -> d e"), Row(f"{ours}_bias", f"{theirs}.bias", "e -> e")


def pooled_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of the heads that describe a sequence."""
    return (*dense_rows("head/pool", f"{prefix}pooler.dense"), *dense_rows("head/classify", "classifier"))


PREDICTIONS = (
    *dense_rows("head/transform", "cls.predictions.transform.dense"),
    *norm_rows("head/norm", "cls.predictions.transform.LayerNorm"),
    Row("head/rest", "cls.predictions.dense.weight", "e v -> v e"),
    Row("head/bias", "cls.predictions.bias", "v -> v"),
)
"""Rows of the head for masked words"""


def embedding_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of tables and their norm."""
    return (
        Row("embed/table", f"{prefix}embeddings.word_embeddings.weight", "v d -> v d"),
        Row("embed/positions", f"{prefix}embeddings.position_embeddings.weight", "c d -> c d"),
        Row("embed/types", f"{prefix}embeddings.token_type_embeddings.weight", "t d -> t d"),
        *dense_rows("embed/project", f"{prefix}embeddings.embedding_transformation"),
        *norm_rows("embed/norm", f"{prefix}embeddings.LayerNorm"),
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if names is None:
        return Classifier().labels
    try:
        return tuple(str(names[str(i)]) for i in range(len(names)))
    except (KeyError, TypeError):
        raise UserError(f'config.json: id2label = {str(names)[:60]} does not number its labels from "0" on') from None
