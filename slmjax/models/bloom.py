"""BLOOM. Le Scao et al. 2022, arXiv:2211.05100."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu_tanh
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
) -> Decoder:
    """Pre-norm LayerNorm, ALiBi, a norm of the token vectors, a GELU MLP of 4 widths, biases everywhere."""
    mixer = Attention(
        heads=heads, kv_heads=heads, head_dim=width // heads, qkv_bias=True, o_bias=True, position=Alibi()
    )
    norm = LayerNorm(eps=eps)
    mlp = MLP(hidden=4 * width, activation=gelu_tanh, bias=True)
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=(Block(mixer=mixer, mlp=mlp, norm=norm),),
        repeats=layers,
        context=context,
        tied=tied,
        final_norm=norm,
        embed_norm=norm,
    )


def bloom_560m() -> Decoder:
    """559,214,592 parameters."""
    return bloom(layers=24, width=1024, heads=16)


def bloom_1_1b() -> Decoder:
    """1,065,314,304 parameters."""
    return bloom(layers=24, width=1536, heads=16)


_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
_QKV_BIAS = ("layers/attn/q_bias", "layers/attn/k_bias", "layers/attn/v_bias")
_LAYER = "transformer.h.{}"
HF = (
    Row("embed/table", "transformer.word_embeddings.weight", "v d -> v d"),
    Row("embed/norm/scale", "transformer.word_embeddings_layernorm.weight", "d -> d"),
    Row("embed/norm/bias", "transformer.word_embeddings_layernorm.bias", "d -> d"),
    Row("layers/attn_norm/scale", f"{_LAYER}.input_layernorm.weight", "d -> d"),
    Row("layers/attn_norm/bias", f"{_LAYER}.input_layernorm.bias", "d -> d"),
    Row(_QKV, f"{_LAYER}.self_attention.query_key_value.weight", "(h n k) d -> n d h k"),
    Row(_QKV_BIAS, f"{_LAYER}.self_attention.query_key_value.bias", "(h n k) -> n h k"),
    Row("layers/attn/o", f"{_LAYER}.self_attention.dense.weight", "d (h k) -> h k d"),
    Row("layers/attn/o_bias", f"{_LAYER}.self_attention.dense.bias", "d -> d"),
    Row("layers/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", "d -> d"),
    Row("layers/mlp_norm/bias", f"{_LAYER}.post_attention_layernorm.bias", "d -> d"),
    Row("layers/mlp/up", f"{_LAYER}.mlp.dense_h_to_4h.weight", "f d -> d f"),
    Row("layers/mlp/up_bias", f"{_LAYER}.mlp.dense_h_to_4h.bias", "f -> f"),
    Row("layers/mlp/down", f"{_LAYER}.mlp.dense_4h_to_h.weight", "d f -> f d"),
    Row("layers/mlp/down_bias", f"{_LAYER}.mlp.dense_4h_to_h.bias", "d -> d"),
    Row("final_norm/scale", "transformer.ln_f.weight", "d -> d"),
    Row("final_norm/bias", "transformer.ln_f.bias", "d -> d"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as BloomForCausalLM saves them: q, k and v lie side by side in each head"""


def rows(decoder: Decoder) -> tuple[Row, ...]:
    """The rows of `HF` whose parameters this decoder has."""
    return present(HF, decoder)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The BloomConfig of this decoder, or None if there is none."""
    block = decoder.pattern[0]
    mixer, norm = block.mixer, block.norm
    if not (isinstance(mixer, Attention) and isinstance(norm, LayerNorm)) or decoder.width % mixer.heads:
        return None
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "n_layer": decoder.layers,
        "n_head": mixer.heads,
        "layer_norm_epsilon": norm.eps,
        "initializer_range": decoder.initial.std,
        "tie_word_embeddings": decoder.tied,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_length": decoder.context,
        "use_cache": True,
    }
    return config if replace(from_config(config), initial=decoder.initial) == decoder else None


def from_config(config: Mapping[str, Any]) -> Decoder:
    """BloomConfig -> decoder. Absent fields have the defaults of BloomConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    fields.expect("apply_residual_connection_post_layernorm", False)
    fields.expect("n_inner", None)
    # How the work was divided when it was trained: the same maths, in another order of summation.
    for key in ("pretraining_tp", "slow_but_exact", "skip_bias_add", "skip_bias_add_qkv", "offset_alibi"):
        fields.take(key, (bool, int), None)
    for key in ("attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"):
        fields.take(key, bool, None)
    decoder = bloom(
        layers=fields.either("n_layer", "num_hidden_layers", kind=int, default=2),
        width=fields.either("n_embed", "hidden_size", kind=int, default=64),
        heads=fields.either("n_head", "num_attention_heads", kind=int, default=8),
        vocab=fields.take("vocab_size", int, 250880),
        context=fields.take("seq_length", int, 2048),  # no field of the class: ALiBi has no bound
        tied=fields.take("tie_word_embeddings", bool, True),
        eps=fields.take("layer_norm_epsilon", (float, int), 1e-5),
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(decoder, initial=Initial(std=std))


FAMILY = Family(
    name="BLOOM",
    model_type="bloom",
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    sizes={"bloom/560m": bloom_560m, "bloom/1.1b": bloom_1_1b},
)
