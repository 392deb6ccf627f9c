"""BERT. Devlin et al. 2019, arXiv:1810.04805. TinyBERT and MiniLM are smaller ones."""

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
    plain,
    pooled_rows,
)  # fmt: skip
from slmjax.models.encoder import Encoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.block import PostNorm
from slmjax.nn.heads import Head, MaskedWords, Pooler
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import NoPosition


def bert(
    *,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    vocab: int = 30522,
    context: int = 512,
    types: int = 2,
    eps: float = 1e-12,
    activation: Callable = gelu,
    head: Head | None = None,
) -> Encoder:
    """Post-norm LayerNorm, attention in both directions, learned positions, GELU; biases everywhere.

    Args:
        head: None for masked words, with this norm and activation.
    """
    norm = LayerNorm(eps=eps)
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        qkv_bias=True,
        o_bias=True,
        position=NoPosition(),
        causal=False,
    )
    block = PostNorm(mixer=mixer, mlp=MLP(hidden=hidden, activation=activation, bias=True), norm=norm)
    return Encoder(
        vocab=vocab,
        width=width,
        pattern=(block,),
        repeats=layers,
        context=context,
        types=types,
        embed_norm=norm,
        head=MaskedWords(norm=norm, activation=activation) if head is None else head,
    )


def bert_base() -> Encoder:
    """109,514,298 parameters."""
    return bert(layers=12, width=768, heads=12, hidden=3072)


def tinybert_4l() -> Encoder:
    """14,350,248 parameters. Jiao et al. 2020, arXiv:1909.10351."""
    return bert(layers=4, width=312, heads=12, hidden=1200, head=Pooler())


def tinybert_6l() -> Encoder:
    """66,955,008 parameters. Jiao et al. 2020, arXiv:1909.10351."""
    return bert(layers=6, width=768, heads=12, hidden=3072, head=Pooler())


def minilm_6l() -> Encoder:
    """22,713,216 parameters. Wang et al. 2020, arXiv:2002.10957."""
    return bert(layers=6, width=384, heads=12, hidden=1536, head=Pooler())


KINDS = kinds("Bert", "bert.", pooler=True)


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
        *dense_rows("layers/mlp/up", f"{layer}.intermediate.dense"),
        *dense_rows("layers/mlp/down", f"{layer}.output.dense"),
        *norm_rows("layers/mlp_norm", f"{layer}.output.LayerNorm"),
        *pooled_rows(prefix),
        *PREDICTIONS,
    )
    return present(table, encoder)


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The BertConfig of this encoder, or None if there is none."""
    kind = kind_of(KINDS, encoder) if plain(encoder) else None
    if kind is None:
        return None
    block = encoder.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)):
        return None
    if activation_name(mlp.activation) is None or encoder.width % mixer.heads or encoder.types < 1:
        return None
    config = {
        "architectures": [kind.architecture],
        "model_type": "bert",
        "vocab_size": encoder.vocab,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.hidden,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": encoder.context,
        "type_vocab_size": encoder.types,
        "layer_norm_eps": norm.eps,
        "initializer_range": encoder.initial.std,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **head_fields(encoder),
    }
    return config if replace(from_config(config), initial=encoder.initial) == encoder else None


def from_config(config: Mapping[str, Any]) -> Encoder:
    """BertConfig -> encoder. Absent fields have the defaults of BertConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    width = fields.take("hidden_size", int, 768)
    ignore_dropout(fields, "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    fields.expect("position_embedding_type", "absolute")
    fields.expect("add_cross_attention", False)
    fields.expect("tie_word_embeddings", True)
    fields.expect("emb_size", width)  # of TinyBERT's files
    activation = fields.activation("hidden_act", "gelu")
    eps = float(fields.take("layer_norm_eps", (float, int), 1e-12))
    encoder = bert(
        layers=fields.take("num_hidden_layers", int, 12),
        width=width,
        heads=fields.take("num_attention_heads", int, 12),
        hidden=fields.take("intermediate_size", int, 3072),
        vocab=fields.take("vocab_size", int, 30522),
        context=fields.take("max_position_embeddings", int, 512),
        types=fields.take("type_vocab_size", int, 2),
        eps=eps,
        activation=activation,
        head=head_of(KINDS, config, MaskedWords(norm=LayerNorm(eps=eps), activation=activation)),
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(encoder, initial=Initial(std=std))


FAMILY = Family(
    name="BERT",
    model_type="bert",
    kind=Encoder,
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    asked=asked(KINDS),
    renamed=GREEK,
    repeats={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread=r"cls\.seq_relationship\..*|(bert\.)?embeddings\.position_ids",
    sizes={
        "bert/base": bert_base,
        "tinybert/4l-312": tinybert_4l,
        "tinybert/6l-768": tinybert_6l,
        "minilm/6l-384": minilm_6l,
    },
)
