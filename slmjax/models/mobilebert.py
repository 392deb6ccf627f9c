"""MobileBERT: as deep as BERT-large, narrow inside each layer. Sun et al. 2020, arXiv:2004.02984."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.bert_like import (
    GREEK,
    PREDICTIONS,
    asked,
    attention_rows,
    dense_rows,
    embedding_rows,
    head_fields,
    head_of,
    ignore_dropout,
    kind_of,
    kinds,
    norm_rows,
    pooled_rows,
)  # fmt: skip
from slmjax.models.encoder import Encoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.table import Family, Row, present
from slmjax.nn.bottleneck import Affine, Bottleneck, SplitAttention
from slmjax.nn.heads import Head, MaskedWords
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, relu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import NoPosition


def mobilebert(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    hidden: int,
    embedding: int,
    feeds: int = 4,
    vocab: int = 30522,
    context: int = 512,
    types: int = 2,
    eps: float = 1e-12,
    activation: Callable = relu,
    head: Head | None = None,
) -> Encoder:
    """Bottlenecks of `inner` channels with `feeds` feed-forward layers, affine maps in place of norms, ReLU, and a
    table of `embedding` columns read three tokens at a time.

    Args:
        eps: of the LayerNorm in the head for masked words, the only one.
        head: None for masked words.
    """
    mixer = SplitAttention(
        heads=heads,
        kv_heads=heads,
        head_dim=inner // heads,
        qkv_bias=True,
        o_bias=True,
        position=NoPosition(),
        causal=False,
    )
    mlp = MLP(hidden=hidden, activation=activation, bias=True)
    block = Bottleneck(mixer=mixer, mlp=mlp, norm=Affine(), inner=inner, feeds=feeds)
    return Encoder(
        vocab=vocab,
        width=width,
        pattern=(block,),
        repeats=layers,
        context=context,
        types=types,
        embed_norm=Affine(),
        trigram=embedding,
        head=MaskedWords(norm=LayerNorm(eps=eps), activation=activation) if head is None else head,
    )


def mobilebert_base() -> Encoder:
    """36,596,538 parameters: 24,581,888 of the encoder, and the head with columns of its own for each word."""
    return mobilebert(layers=24, width=512, inner=128, heads=4, hidden=512, embedding=128)


KINDS = kinds("MobileBert", "mobilebert.", pooler=True)


def rows(encoder: Encoder) -> tuple[Row, ...]:
    """The rows of the class with this head."""
    kind = kind_of(KINDS, encoder)
    prefix = "" if kind is None else kind.prefix
    layer = f"{prefix}encoder.layer.{{}}"
    table = (
        *embedding_rows(prefix),
        *attention_rows(
            layer, "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
        ),
        *norm_rows("layers/attn_norm", f"{layer}.attention.output.LayerNorm"),
        *_narrow("narrow", f"{layer}.bottleneck.input"),
        *_narrow("read", f"{layer}.bottleneck.attention"),
        *_feeds(encoder, layer),
        *dense_rows("layers/widen", f"{layer}.output.bottleneck.dense"),
        *norm_rows("layers/out_norm", f"{layer}.output.bottleneck.LayerNorm"),
        *pooled_rows(prefix),
        *PREDICTIONS,
    )
    return present(table, encoder)


def _narrow(ours: str, theirs: str) -> tuple[Row, ...]:
    return *dense_rows(f"layers/{ours}", f"{theirs}.dense"), *norm_rows(f"layers/{ours}_norm", f"{theirs}.LayerNorm")


def _feed(i: int, up: str, down: str) -> tuple[Row, ...]:
    return (
        *dense_rows(f"layers/mlp_{i}/up", f"{up}.dense"),
        *dense_rows(f"layers/mlp_{i}/down", f"{down}.dense"),
        *norm_rows(f"layers/mlp_{i}_norm", f"{down}.LayerNorm"),
    )


def _feeds(encoder: Encoder, layer: str) -> tuple[Row, ...]:
    """The last feed-forward layer of a block has names of its own."""
    block = encoder.pattern[0]
    last = block.feeds - 1 if isinstance(block, Bottleneck) else 0
    names = [(f"{layer}.ffn.{i}.intermediate", f"{layer}.ffn.{i}.output") for i in range(last)]
    names.append((f"{layer}.intermediate", f"{layer}.output"))
    return tuple(row for i, (up, down) in enumerate(names) for row in _feed(i, up, down))


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The MobileBertConfig of this encoder, or None if there is none."""
    if not isinstance(encoder, Encoder) or encoder.trigram is None:
        return None
    kind, block = kind_of(KINDS, encoder), encoder.pattern[0]
    if kind is None or not isinstance(block, Bottleneck):
        return None
    mixer, mlp = block.mixer, block.mlp
    norm = encoder.head.norm if isinstance(encoder.head, MaskedWords) else None
    if not (isinstance(mixer, SplitAttention) and isinstance(mlp, MLP)):
        return None
    if activation_name(mlp.activation) is None or block.inner % mixer.heads or encoder.types < 1:
        return None
    config = {
        "architectures": [kind.architecture],
        "model_type": "mobilebert",
        "vocab_size": encoder.vocab,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.hidden,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": encoder.context,
        "type_vocab_size": encoder.types,
        "layer_norm_eps": norm.eps if isinstance(norm, LayerNorm) else 1e-12,
        "initializer_range": encoder.initial.std,
        "embedding_size": encoder.trigram,
        "intra_bottleneck_size": block.inner,
        "true_hidden_size": block.inner,
        "num_feedforward_networks": block.feeds,
        **PUBLISHED,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **head_fields(encoder),
    }
    return config if replace(from_config(config), initial=encoder.initial) == encoder else None


PUBLISHED = {
    "trigram_input": True,
    "use_bottleneck": True,
    "use_bottleneck_attention": False,
    "key_query_shared_bottleneck": True,
    "normalization_type": "no_norm",
    "classifier_activation": True,
    "tie_word_embeddings": True,
}
"""Switches of the configuration in the position of the published model; no other is supported"""


def from_config(config: Mapping[str, Any]) -> Encoder:
    """MobileBertConfig -> encoder. Absent fields have the defaults of MobileBertConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    ignore_dropout(fields, "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    for name, value in PUBLISHED.items():
        fields.expect(name, value)
    activation = fields.activation("hidden_act", "relu")
    inner = fields.take("intra_bottleneck_size", int, 128)
    fields.expect("true_hidden_size", inner)
    eps = float(fields.take("layer_norm_eps", (float, int), 1e-12))
    encoder = mobilebert(
        layers=fields.take("num_hidden_layers", int, 24),
        width=fields.take("hidden_size", int, 512),
        inner=inner,
        heads=fields.take("num_attention_heads", int, 4),
        hidden=fields.take("intermediate_size", int, 512),
        embedding=fields.take("embedding_size", int, 128),
        feeds=fields.take("num_feedforward_networks", int, 4),
        vocab=fields.take("vocab_size", int, 30522),
        context=fields.take("max_position_embeddings", int, 512),
        types=fields.take("type_vocab_size", int, 2),
        activation=activation,
        head=head_of(KINDS, config, MaskedWords(norm=LayerNorm(eps=eps), activation=activation)),
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(encoder, initial=Initial(std=std))


FAMILY = Family(
    name="MobileBERT",
    model_type="mobilebert",
    kind=Encoder,
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    asked=asked(KINDS),
    renamed=GREEK,
    repeats={
        "cls.predictions.decoder.weight": "mobilebert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread=r"cls\.seq_relationship\..*|(mobilebert\.)?embeddings\.position_ids",
    sizes={"mobilebert/base": mobilebert_base},
)
