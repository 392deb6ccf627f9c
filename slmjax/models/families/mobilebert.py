"""MobileBERT: as deep as BERT-large, narrow inside each layer. Sun et al. 2020, arXiv:2004.02984."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.encoder import Encoder
from slmjax.models.families.common.bert_like import GREEK, bert_config, bert_fields, bert_rows, kind_of, kinds, stock
from slmjax.models.families.common.config_fields import Fields, activation_name, exact, finished
from slmjax.models.families.common.rows import Family, Row, dense_rows, norm_rows
from slmjax.nn.bottleneck import Affine, Bottleneck, SplitAttention
from slmjax.nn.heads import Head, MaskedWords
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
        eps: of the LayerNorm in the masked-token head, the only LayerNorm.
        head: None for `MaskedWords`.
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
    """36,596,538 parameters: 24,581,888 of the encoder, the rest of the masked-token head."""
    return mobilebert(layers=24, width=512, inner=128, heads=4, hidden=512, embedding=128)


KINDS = kinds("MobileBert", "mobilebert.", pooler=True)


def _feed_forward(layer: str, encoder: Encoder) -> tuple[Row, ...]:
    return (
        *_narrow("narrow", f"{layer}.bottleneck.input"),
        *_narrow("read", f"{layer}.bottleneck.attention"),
        *_feeds(encoder, layer),
        *dense_rows("layers/widen", f"{layer}.output.bottleneck.dense"),
        *norm_rows("layers/out_norm", f"{layer}.output.bottleneck.LayerNorm"),
    )


def _narrow(ours: str, theirs: str) -> tuple[Row, ...]:
    return *dense_rows(f"layers/{ours}", f"{theirs}.dense"), *norm_rows(f"layers/{ours}_norm", f"{theirs}.LayerNorm")


def _feed(i: int, up: str, down: str) -> tuple[Row, ...]:
    return (
        *dense_rows(f"layers/mlp_{i}/up", f"{up}.dense"),
        *dense_rows(f"layers/mlp_{i}/down", f"{down}.dense"),
        *norm_rows(f"layers/mlp_{i}_norm", f"{down}.LayerNorm"),
    )


def _feeds(encoder: Encoder, layer: str) -> tuple[Row, ...]:
    """Rows of all feed-forward layers of a block; the last one is named differently."""
    block = encoder.pattern[0]
    last = block.feeds - 1 if isinstance(block, Bottleneck) else 0
    names = [(f"{layer}.ffn.{i}.intermediate", f"{layer}.ffn.{i}.output") for i in range(last)]
    names.append((f"{layer}.intermediate", f"{layer}.output"))
    return tuple(row for i, (up, down) in enumerate(names) for row in _feed(i, up, down))


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The MobileBertConfig of this encoder, or None if there is none."""
    kind = kind_of(KINDS, encoder)
    if kind is None or not isinstance(block := encoder.pattern[0], Bottleneck):
        return None
    mixer, mlp = block.mixer, block.mlp
    norm = encoder.head.norm if isinstance(encoder.head, MaskedWords) else None
    if not (isinstance(mixer, SplitAttention) and isinstance(mlp, MLP)):
        return None
    if activation_name(mlp.activation) is None or block.inner % mixer.heads or encoder.types < 1:
        return None
    eps = norm.eps if isinstance(norm, LayerNorm) else 1e-12
    config = {
        **bert_config(encoder, kind, "mobilebert", mixer.heads, mlp, eps),
        "embedding_size": encoder.trigram,
        "intra_bottleneck_size": block.inner,
        "true_hidden_size": block.inner,
        "num_feedforward_networks": block.feeds,
        **PUBLISHED,
    }
    return exact(config, from_config, encoder)


PUBLISHED = {
    "trigram_input": True,
    "use_bottleneck": True,
    "use_bottleneck_attention": False,
    "key_query_shared_bottleneck": True,
    "normalization_type": "no_norm",
    "classifier_activation": True,
}
"""Fields of the configuration that are supported only with the value of the published model"""


def from_config(config: Mapping[str, Any]) -> Encoder:
    """MobileBertConfig -> encoder. Absent fields have the defaults of MobileBertConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    for name, value in PUBLISHED.items():
        fields.expect(name, value)
    inner = fields.take("intra_bottleneck_size", int, 128)
    fields.expect("true_hidden_size", inner)
    encoder = mobilebert(
        **bert_fields(fields, config, KINDS, layers=24, width=512, heads=4, hidden=512, activation="relu"),
        inner=inner,
        embedding=fields.take("embedding_size", int, 128),
        feeds=fields.take("num_feedforward_networks", int, 4),
    )
    return finished(fields, encoder)


FAMILY = Family(
    name="MobileBERT",
    model_type="mobilebert",
    kind=Encoder,
    rows=bert_rows(KINDS, _feed_forward),
    to_config=to_config,
    from_config=from_config,
    stock=stock(KINDS),
    renamed=GREEK,
    repeats={
        "cls.predictions.decoder.weight": "mobilebert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread=r"cls\.seq_relationship\..*|(mobilebert\.)?embeddings\.position_ids",
    sizes={"mobilebert/base": mobilebert_base},
)
