"""BERT. Devlin et al. 2019, arXiv:1810.04805. TinyBERT and MiniLM are smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.encoder import Encoder
from slmjax.models.families.common.bert_like import GREEK, bert_config, bert_fields, bert_rows, kind_of, kinds, stock
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.gpt_like import gpt_block, parts
from slmjax.models.families.common.rows import Family, Row, dense_rows, norm_rows
from slmjax.nn.block import PostNorm
from slmjax.nn.heads import Head, MaskedWords, Pooler
from slmjax.nn.mlp import gelu
from slmjax.nn.norm import LayerNorm


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
        head: None for `MaskedWords` with this norm and activation.
    """
    norm = LayerNorm(eps=eps)
    block = gpt_block(
        width=width, heads=heads, hidden=hidden, norm=norm, activation=activation, kind=PostNorm, causal=False
    )
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


def _feed_forward(layer: str, encoder: Encoder) -> tuple[Row, ...]:
    return (
        *dense_rows("layers/mlp/up", f"{layer}.intermediate.dense"),
        *dense_rows("layers/mlp/down", f"{layer}.output.dense"),
        *norm_rows("layers/mlp_norm", f"{layer}.output.LayerNorm"),
    )


def to_config(encoder: Any) -> dict[str, Any] | None:
    """The BertConfig of this encoder, or None if there is none."""
    kind, first = kind_of(KINDS, encoder), parts(encoder)
    if kind is None or first is None or encoder.types < 1:
        return None
    config = {
        **bert_config(encoder, kind, "bert", first.mixer.heads, first.mlp, first.norm.eps),
        "position_embedding_type": "absolute",
    }
    return exact(config, from_config, encoder)


def from_config(config: Mapping[str, Any]) -> Encoder:
    """BertConfig -> encoder. Absent fields have the defaults of BertConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    fields.expect("position_embedding_type", "absolute")
    fields.expect("add_cross_attention", False)
    common = bert_fields(fields, config, KINDS, layers=12, width=768, heads=12, hidden=3072, activation="gelu")
    fields.expect("emb_size", common["width"])  # a field of TinyBERT's files
    return finished(fields, bert(**common))


FAMILY = Family(
    name="BERT",
    model_type="bert",
    kind=Encoder,
    rows=bert_rows(KINDS, _feed_forward),
    to_config=to_config,
    from_config=from_config,
    stock=stock(KINDS),
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
