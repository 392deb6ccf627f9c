"""Llama, and the small models of its shape. Touvron et al. 2023, arXiv:2302.13971.

Sizes: SmolLM2 (Allal et al. 2025, arXiv:2502.02737), TinyLlama (Zhang et al. 2024, arXiv:2401.02385),
Llama 3.2 (Meta 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.hf_rope import both_versions, rope_from_config
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import GatedMLP, silu
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import Llama3Scaling, RopeScaling


def llama(
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    vocab: int,
    context: int = 2048,
    tied: bool = True,
    theta: float = 1e4,
    scaling: RopeScaling | None = None,
    head_dim: int | None = None,
    eps: float = 1e-5,
    activation: Callable = silu,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Decoder:
    """Pre-norm RMSNorm, grouped-query attention, rotary positions, SwiGLU; no biases unless asked for."""
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        position=Rope(theta=theta, scaling=scaling),
    )
    norm = RMSNorm(eps=eps)
    block = Block(mixer=mixer, mlp=GatedMLP(hidden=hidden, activation=activation, bias=mlp_bias), norm=norm)
    return Decoder(
        vocab=vocab, width=width, pattern=(block,), repeats=layers, context=context, tied=tied, final_norm=norm
    )


def smollm2_135m() -> Decoder:
    """134,515,008 parameters."""
    return llama(
        layers=30, width=576, heads=9, kv_heads=3, hidden=1536, vocab=49152, context=8192, tied=True, theta=1e5
    )


def smollm2_360m() -> Decoder:
    """361,821,120 parameters."""
    return llama(
        layers=32, width=960, heads=15, kv_heads=5, hidden=2560, vocab=49152, context=8192, tied=True, theta=1e5
    )


def smollm2_1_7b() -> Decoder:
    """1,711,376,384 parameters."""
    return llama(
        layers=24, width=2048, heads=32, kv_heads=32, hidden=8192, vocab=49152, context=8192, tied=True, theta=1.3e5
    )


def tinyllama_1_1b() -> Decoder:
    """1,100,048,384 parameters."""
    return llama(
        layers=22, width=2048, heads=32, kv_heads=4, hidden=5632, vocab=32000, context=2048, tied=False, theta=1e4
    )


def llama_3_2_1b() -> Decoder:
    """1,235,814,400 parameters."""
    return llama(
        layers=16, width=2048, heads=32, kv_heads=8, hidden=8192, vocab=128256, context=131072, tied=True, theta=5e5,
        scaling=Llama3Scaling(factor=32.0),
    )  # fmt: skip


def llama_3_2_3b() -> Decoder:
    """3,212,749,824 parameters."""
    return llama(
        layers=28, width=3072, heads=24, kv_heads=8, hidden=8192, vocab=128256, context=131072, tied=True, theta=5e5,
        scaling=Llama3Scaling(factor=32.0),
    )  # fmt: skip


_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
HF = (
    Row("embed/table", "model.embed_tokens.weight", "v d -> v d"),
    Row("layers/attn_norm/scale", "model.layers.{}.input_layernorm.weight", "d -> d"),
    Row("layers/attn/q", f"{_ATTENTION}.q_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/k", f"{_ATTENTION}.k_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/v", f"{_ATTENTION}.v_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/o", f"{_ATTENTION}.o_proj.weight", "d (h k) -> h k d"),
    Row("layers/attn/q_bias", f"{_ATTENTION}.q_proj.bias", "(h k) -> h k"),
    Row("layers/attn/k_bias", f"{_ATTENTION}.k_proj.bias", "(h k) -> h k"),
    Row("layers/attn/v_bias", f"{_ATTENTION}.v_proj.bias", "(h k) -> h k"),
    Row("layers/attn/o_bias", f"{_ATTENTION}.o_proj.bias", "d -> d"),
    Row("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "d -> d"),
    Row("layers/mlp/gate", f"{_MLP}.gate_proj.weight", "f d -> d f"),
    Row("layers/mlp/up", f"{_MLP}.up_proj.weight", "f d -> d f"),
    Row("layers/mlp/down", f"{_MLP}.down_proj.weight", "d f -> f d"),
    Row("layers/mlp/gate_bias", f"{_MLP}.gate_proj.bias", "f -> f"),
    Row("layers/mlp/up_bias", f"{_MLP}.up_proj.bias", "f -> f"),
    Row("layers/mlp/down_bias", f"{_MLP}.down_proj.bias", "d -> d"),
    Row("final_norm/scale", "model.norm.weight", "d -> d"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as LlamaForCausalLM saves them"""


def rows(decoder: Decoder) -> tuple[Row, ...]:
    """The rows of `HF` whose parameters this decoder has."""
    return present(HF, decoder)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The LlamaConfig of this decoder, with the keys of transformers 4 beside those of 5; None if there is none."""
    block = decoder.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, GatedMLP) and isinstance(norm, RMSNorm)):
        return None
    position = mixer.position
    # LlamaConfig itself refuses a width that the heads do not divide.
    if not isinstance(position, Rope) or decoder.width % mixer.heads or activation_name(mlp.activation) is None:
        return None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "intermediate_size": mlp.hidden,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": decoder.context,
        "initializer_range": decoder.initial.std,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": decoder.tied,
        "attention_bias": mixer.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": mlp.bias,
        **both_versions(position),
        "use_cache": True,
    }
    return config if replace(from_config(config), initial=decoder.initial) == decoder else None


def from_config(config: Mapping[str, Any]) -> Decoder:
    """LlamaConfig -> decoder. Absent fields have the defaults of LlamaConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    heads = fields.take("num_attention_heads", int, 32)
    width = fields.take("hidden_size", int, 4096)
    context = fields.take("max_position_embeddings", int, 2048)
    rope = rope_from_config(fields, context=context)
    if rope.fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor = {rope.fraction} is not supported; only 1.0 is")
    fields.expect("pretraining_tp", 1)
    decoder = llama(
        layers=fields.take("num_hidden_layers", int, 32),
        width=width,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int, heads),
        head_dim=fields.take("head_dim", int, width // heads),
        hidden=fields.take("intermediate_size", int, 11008),
        activation=fields.activation("hidden_act", "silu"),
        vocab=fields.take("vocab_size", int, 32000),
        context=context,
        tied=fields.take("tie_word_embeddings", bool, False),
        theta=rope.theta,
        scaling=rope.scaling,
        eps=fields.take("rms_norm_eps", (float, int), 1e-6),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(decoder, initial=Initial(std=std))


FAMILY = Family(
    name="Llama",
    model_type="llama",
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    sizes={
        "llama/smollm2-135m": smollm2_135m,
        "llama/smollm2-360m": smollm2_360m,
        "llama/smollm2-1.7b": smollm2_1_7b,
        "llama/tinyllama-1.1b": tinyllama_1_1b,
        "llama/llama-3.2-1b": llama_3_2_1b,
        "llama/llama-3.2-3b": llama_3_2_3b,
    },
)
