"""DistilBERT: BERT without token types and pooler, half as deep. Sanh et al. 2019, arXiv:1910.01108."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.encoder import Encoder
from slmjax.models.families.bert import bert
from slmjax.models.families.common.bert_like import (
    GREEK,
    embedding_rows,
    head_fields,
    head_of,
    ignore_dropout,
    kind_of,
    kinds,
    prefix_of,
    stock,
)
from slmjax.models.families.common.config_fields import Fields, Names, exact, finished
from slmjax.models.families.common.gpt_like import parts
from slmjax.models.families.common.rows import Family, Row, attention_rows, dense_rows, norm_rows, present
from slmjax.nn.heads import Head
from slmjax.nn.mlp import gelu, relu


def distilbert(
    *,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    vocab: int = 30522,
    context: int = 512,
    activation: Callable = gelu,
    head: Head | None = None,
) -> Encoder:
    """`bert` without token types; the epsilon of its norms is 1e-12.

    Args:
        head: None for `MaskedWords` with this activation.
    """
    return bert(
        layers=layers,
        width=width,
        heads=heads,
        hidden=hidden,
        vocab=vocab,
        context=context,
        types=0,
        activation=activation,
        head=head,
    )


def distilbert_base() -> Encoder:
    """66,985,530 parameters."""
    return distilbert(layers=6, width=768, heads=12, hidden=3072)


KINDS = kinds("DistilBert", "distilbert.", pooler=False)


def rows(encoder: Encoder) -> tuple[Row, ...]:
    """The rows of the class that has the head of this encoder."""
    prefix = prefix_of(KINDS, encoder)
    layer = f"{prefix}transformer.layer.{{}}"
    names = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
    table = (
        *embedding_rows(prefix),
        *attention_rows(layer, *names),
        *norm_rows("layers/attn_norm", f"{layer}.sa_layer_norm"),
        *dense_rows("layers/mlp/up", f"{layer}.ffn.lin1"),
        *dense_rows("layers/mlp/down", f"{layer}.ffn.lin2"),
        *norm_rows("layers/mlp_norm", f"{layer}.output_layer_norm"),
        *dense_rows("head/transform", "vocab_transform"),
        *norm_rows("head/norm", "vocab_layer_norm"),
        Row("head/bias", "vocab_projector.bias", "v -> v"),
        *dense_rows("head/pool", "pre_classifier"),
        *dense_rows("head/classify", "classifier"),
    )
    return present(table, encoder)


NAMES = Names(layers="n_layers", width="dim", heads="n_heads", hidden="hidden_dim", activation="activation")


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The DistilBertConfig of this encoder, or None if there is none."""
    kind, first = kind_of(KINDS, encoder), parts(encoder)
    if kind is None or first is None:
        return None
    config = {
        **NAMES.written(encoder, kind.architecture, "distilbert", first.mixer.heads, first.mlp),
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        **head_fields(encoder),
    }
    return exact(config, from_config, encoder)


def from_config(config: Mapping[str, Any]) -> Encoder:
    """DistilBertConfig -> encoder. Absent fields have the defaults of DistilBertConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    ignore_dropout(fields, "dropout", "qa_dropout", "seq_classif_dropout")
    fields.take("sinusoidal_pos_embds", bool, False)  # how positions were initialized; they are stored either way
    fields.expect("tie_word_embeddings", True)
    fields.expect("tie_weights_", True)
    common = NAMES.read(fields, layers=6, width=768, heads=12, hidden=3072, vocab=30522, context=512, activation="gelu")
    return finished(fields, distilbert(**common, head=head_of(KINDS, config, activation=relu)))


FAMILY = Family(
    name="DistilBERT",
    model_type="distilbert",
    kind=Encoder,
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    stock=stock(KINDS),
    renamed=GREEK,
    repeats={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    unread=r"(distilbert\.)?embeddings\.position_ids",
    sizes={"distilbert/base": distilbert_base},
)
