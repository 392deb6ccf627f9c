"""DistilBERT: BERT without token types and pooler, half as deep. Sanh et al. 2019, arXiv:1910.01108."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.bert import bert
from slmjax.models.bert_like import (
    GREEK,
    asked,
    attention_rows,
    dense_rows,
    embedding_rows,
    head_of,
    ignore_dropout,
    kind_of,
    kinds,
    norm_rows,
    plain,
)  # fmt: skip
from slmjax.models.encoder import Encoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.heads import Head, MaskedWords
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu
from slmjax.nn.norm import LayerNorm


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
        head: None for masked words, with this activation.
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
    """The rows of the class with this head."""
    kind = kind_of(KINDS, encoder)
    prefix = "" if kind is None else kind.prefix
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
    )
    return present(table, encoder)


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The DistilBertConfig of this encoder, or None if there is none."""
    kind = kind_of(KINDS, encoder) if plain(encoder) else None
    if kind is None:
        return None
    mixer, mlp = encoder.pattern[0].mixer, encoder.pattern[0].mlp
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP)):
        return None
    if activation_name(mlp.activation) is None or encoder.width % mixer.heads:
        return None
    config = {
        "architectures": [kind.architecture],
        "model_type": "distilbert",
        "vocab_size": encoder.vocab,
        "max_position_embeddings": encoder.context,
        "dim": encoder.width,
        "n_layers": encoder.layers,
        "n_heads": mixer.heads,
        "hidden_dim": mlp.hidden,
        "activation": activation_name(mlp.activation),
        "initializer_range": encoder.initial.std,
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return config if replace(from_config(config), initial=encoder.initial) == encoder else None


def from_config(config: Mapping[str, Any]) -> Encoder:
    """DistilBertConfig -> encoder. Absent fields have the defaults of DistilBertConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    ignore_dropout(fields, "dropout", "qa_dropout", "seq_classif_dropout")
    fields.take("sinusoidal_pos_embds", bool, False)  # how positions were drawn; they are stored either way
    fields.expect("tie_word_embeddings", True)
    fields.expect("tie_weights_", True)
    activation = fields.activation("activation", "gelu")
    encoder = distilbert(
        layers=fields.take("n_layers", int, 6),
        width=fields.take("dim", int, 768),
        heads=fields.take("n_heads", int, 12),
        hidden=fields.take("hidden_dim", int, 3072),
        vocab=fields.take("vocab_size", int, 30522),
        context=fields.take("max_position_embeddings", int, 512),
        activation=activation,
        head=head_of(KINDS, config, MaskedWords(norm=LayerNorm(eps=1e-12), activation=activation)),
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(encoder, initial=Initial(std=std))


FAMILY = Family(
    name="DistilBERT",
    model_type="distilbert",
    kind=Encoder,
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    asked=asked(KINDS),
    renamed=GREEK,
    repeats={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    unread=r"(distilbert\.)?embeddings\.position_ids",
    sizes={"distilbert/base": distilbert_base},
)
