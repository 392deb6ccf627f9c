"""What the encoder families have in common: a class of `transformers` for each head, rows and config fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slmjax.errors import UserError
from slmjax.models.encoder import Encoder
from slmjax.models.families.common.config_fields import (
    NUMBER,
    Fields,
    Names,
    labels_from_config,
    labels_to_config,
)
from slmjax.models.families.common.rows import Row, StockModel, attention_rows, dense_rows, norm_rows, present
from slmjax.nn.heads import Bare, Classifier, Head, MaskedWords, Pooler
from slmjax.nn.mlp import MLP, tanh

GREEK = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files from before 2019 -> current names, as `transformers` renames them"""


class Kind(NamedTuple):
    """A class of `transformers`, and the head that it has."""

    architecture: str
    prefix: str
    """Prefix of the encoder's keys in this class"""
    head: type[Head]
    output: str
    """Field of its output that equals the result of `Model.unembed`"""
    first: bool
    """Whether that field is computed for the first token of each sequence only"""


def kinds(name: str, prefix: str, *, pooler: bool) -> tuple[Kind, ...]:
    """The classes `{name}ForMaskedLM` and so on."""
    return (
        Kind(f"{name}ForMaskedLM", prefix, MaskedWords, "logits", False),
        Kind(f"{name}Model", "", Pooler, "pooler_output", True)
        if pooler
        else Kind(f"{name}Model", "", Bare, "last_hidden_state", False),
        Kind(f"{name}ForSequenceClassification", prefix, Classifier, "logits", True),
    )


def kind_of(known: tuple[Kind, ...], model: Any) -> Kind | None:
    """The class with the head of this encoder; None if there is none, or `model` is not an encoder."""
    head = type(getattr(model, "head", None))
    return next((kind for kind in known if kind.head is head), None)


def prefix_of(known: tuple[Kind, ...], encoder: Encoder) -> str:
    """Prefix of the encoder's keys in the class that has its head."""
    kind = kind_of(known, encoder)
    return "" if kind is None else kind.prefix


def stock(known: tuple[Kind, ...]) -> Callable[[Encoder], StockModel]:
    """`Family.stock` of encoders: how stock `transformers` loads and runs one."""

    def of(encoder: Encoder) -> StockModel:
        kind = kind_of(known, encoder)
        assert kind is not None
        return StockModel(
            loader=kind.architecture, output=kind.output, first=kind.first, generates=False, pads="right", closes=True
        )

    return of


def head_of(known: tuple[Kind, ...], config: Mapping[str, Any], *, activation: Callable = tanh) -> Head | None:
    """The head of the class that a config.json names. None stands for the masked-token head, which is the default of
    the families' functions.

    Args:
        activation: of a classifier's head.

    Raises:
        UserError: it names no class, or one that is not supported.
    """
    names = config.get("architectures") or [None]
    kind = next((kind for kind in known if kind.architecture == names[0]), None)
    if kind is None:
        raise UserError(
            f"config.json: architectures = {names[0]!r} is not supported; expected one of "
            f"{', '.join(each.architecture for each in known)}"
        )
    if config.get("is_decoder"):
        raise UserError("config.json: is_decoder = True is not supported; only False is")
    if kind.head is Classifier:
        return Classifier(labels=labels_from_config(config), activation=activation)
    return None if kind.head is MaskedWords else kind.head()


def head_fields(encoder: Encoder) -> dict[str, Any]:
    """The fields of config.json that describe the head."""
    return labels_to_config(encoder.labels) if encoder.labels else {}


def ignore_dropout(fields: Fields, *names: str) -> None:
    """Takes dropout probabilities, which affect only training with `transformers`."""
    for name in names:
        fields.take(name, NUMBER, 0.0)


NAMES = Names()


def bert_config(encoder: Encoder, kind: Kind, model_type: str, heads: int, mlp: MLP, eps: float) -> dict[str, Any]:
    """The fields of config.json that `bert_fields` reads."""
    return {
        **NAMES.written(encoder, kind.architecture, model_type, heads, mlp),
        "type_vocab_size": encoder.types,
        "layer_norm_eps": eps,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **head_fields(encoder),
    }


def bert_fields(fields: Fields, config: Mapping[str, Any], known: tuple[Kind, ...], **defaults: Any) -> dict[str, Any]:
    """The arguments of BERT's function that it shares with MobileBERT's; `defaults` are those of `Names.read`.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    ignore_dropout(fields, "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    fields.expect("tie_word_embeddings", True)
    return {
        **NAMES.read(fields, vocab=30522, context=512, **defaults),
        "types": fields.take("type_vocab_size", int, 2),
        "eps": float(fields.take("layer_norm_eps", NUMBER, 1e-12)),
        "head": head_of(known, config),
    }


def embedding_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of the embedding tables and their norm."""
    return (
        Row("embed/table", f"{prefix}embeddings.word_embeddings.weight", "v d -> v d"),
        Row("embed/positions", f"{prefix}embeddings.position_embeddings.weight", "c d -> c d"),
        Row("embed/types", f"{prefix}embeddings.token_type_embeddings.weight", "t d -> t d"),
        *dense_rows("embed/project", f"{prefix}embeddings.embedding_transformation"),
        *norm_rows("embed/norm", f"{prefix}embeddings.LayerNorm"),
    )


def bert_rows(
    known: tuple[Kind, ...], feed_forward: Callable[[str, Encoder], tuple[Row, ...]]
) -> Callable[[Encoder], tuple[Row, ...]]:
    """`Family.rows` of BERT and MobileBERT. `feed_forward`: (prefix of a layer, encoder) -> the rows of the layer that
    follow attention and its norm."""

    def rows(encoder: Encoder) -> tuple[Row, ...]:
        prefix = prefix_of(known, encoder)
        layer = f"{prefix}encoder.layer.{{}}"
        possible = (
            *embedding_rows(prefix),
            *attention_rows(f"{layer}.attention", "self.query", "self.key", "self.value", "output.dense"),
            *norm_rows("layers/attn_norm", f"{layer}.attention.output.LayerNorm"),
            *feed_forward(layer, encoder),
            *dense_rows("head/pool", f"{prefix}pooler.dense"),
            *dense_rows("head/classify", "classifier"),
            *dense_rows("head/transform", "cls.predictions.transform.dense"),
            *norm_rows("head/norm", "cls.predictions.transform.LayerNorm"),
            Row("head/rest", "cls.predictions.dense.weight", "e v -> v e"),
            Row("head/bias", "cls.predictions.bias", "v -> v"),
        )
        return present(possible, encoder)

    return rows
