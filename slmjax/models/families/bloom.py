"""BLOOM. Le Scao et al. 2022, arXiv:2211.05100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.models.arrange import repeated
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, exact, finished
from slmjax.models.families.common.gpt_like import gpt_block, megatron_rows, parts
from slmjax.models.families.common.rows import Family, Row, norm_rows, table
from slmjax.nn.block import AnyBlock, Block, NormedStream
from slmjax.nn.mlp import gelu_tanh
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Alibi


def bloom(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 250880,
    context: int = 2048,
    tied: bool = True,
    eps: float = 1e-5,
    wiring: type[AnyBlock] = Block,
) -> Decoder:
    """Pre-norm LayerNorm, ALiBi, a norm of the token vectors, a GELU MLP (4 * width), biases everywhere."""
    norm = LayerNorm(eps=eps)
    block = gpt_block(
        width=width, heads=heads, hidden=None, norm=norm, activation=gelu_tanh, kind=wiring, position=Alibi()
    )
    return repeated(block, layers, vocab=vocab, width=width, context=context, tied=tied, embed_norm=norm)


def bloom_560m() -> Decoder:
    """559,214,592 parameters."""
    return bloom(layers=24, width=1024, heads=16)


def bloom_1_1b() -> Decoder:
    """1,065,314,304 parameters."""
    return bloom(layers=24, width=1536, heads=16)


HF = (
    Row("embed/table", "transformer.word_embeddings.weight", "v d -> v d"),
    *norm_rows("embed/norm", "transformer.word_embeddings_layernorm"),
    *megatron_rows("transformer.h.{}", "self_attention"),
    *norm_rows("final_norm", "transformer.ln_f"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as BloomForCausalLM saves them"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The BloomConfig of this decoder, or None if there is none."""
    first = parts(decoder)
    if first is None:
        return None
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "n_layer": decoder.layers,
        "n_head": first.mixer.heads,
        "layer_norm_epsilon": first.norm.eps,
        "initializer_range": decoder.initial.stated,
        "tie_word_embeddings": decoder.tied,
        "apply_residual_connection_post_layernorm": isinstance(decoder.pattern[0], NormedStream),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_length": decoder.context,
        "use_cache": True,
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """BloomConfig -> decoder. Absent fields have the defaults of BloomConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    normed = fields.take("apply_residual_connection_post_layernorm", bool, False)
    fields.expect("n_inner", None)
    # How training was parallelized: the same function, with another order of summation.
    for key in ("pretraining_tp", "slow_but_exact", "skip_bias_add", "skip_bias_add_qkv", "offset_alibi"):
        fields.take(key, (bool, int), None)
    for key in ("attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"):
        fields.take(key, bool, None)
    decoder = bloom(
        layers=fields.either("n_layer", "num_hidden_layers", kind=int, default=2),
        width=fields.either("n_embed", "hidden_size", kind=int, default=64),
        heads=fields.either("n_head", "num_attention_heads", kind=int, default=8),
        vocab=fields.take("vocab_size", int, 250880),
        context=fields.take("seq_length", int, 2048),  # not a field of BloomConfig: ALiBi has no maximum length
        tied=fields.take("tie_word_embeddings", bool, True),
        eps=fields.take("layer_norm_epsilon", NUMBER, 1e-5),
        wiring=NormedStream if normed else Block,
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="BLOOM",
    model_type="bloom",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"bloom/560m": bloom_560m, "bloom/1.1b": bloom_1_1b},
)
