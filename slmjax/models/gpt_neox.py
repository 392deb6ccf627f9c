"""GPT-NeoX: Pythia. Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.hf_rope import rope_from_config, rope_to_config
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.block import AnyBlock, Parallel
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Rope


def gpt_neox(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50304,
    context: int = 2048,
    hidden: int | None = None,
    tied: bool = False,
    position: Rope = Rope(fraction=0.25),  # noqa: B008
    eps: float = 1e-5,
    activation: Callable = gelu,
    attention_bias: bool = True,
    wiring: type[AnyBlock] = Parallel,
) -> Decoder:
    """LayerNorm, rotary positions on a quarter of each head, attention and MLP side by side, each with its own norm."""
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        position=position,
    )
    norm = LayerNorm(eps=eps)
    mlp = MLP(hidden=4 * width if hidden is None else hidden, activation=activation, bias=True)
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=(wiring(mixer=mixer, mlp=mlp, norm=norm),),
        repeats=layers,
        context=context,
        tied=tied,
        final_norm=norm,
    )


def pythia_14m() -> Decoder:
    """14,067,712 parameters."""
    return gpt_neox(layers=6, width=128, heads=4)


def pythia_31m() -> Decoder:
    """30,494,720 parameters."""
    return gpt_neox(layers=6, width=256, heads=8)


def pythia_70m() -> Decoder:
    """70,426,624 parameters."""
    return gpt_neox(layers=6, width=512, heads=8)


def pythia_160m() -> Decoder:
    """162,322,944 parameters."""
    return gpt_neox(layers=12, width=768, heads=12)


def pythia_410m() -> Decoder:
    """405,334,016 parameters."""
    return gpt_neox(layers=24, width=1024, heads=16)


def pythia_1b() -> Decoder:
    """1,011,781,632 parameters."""
    return gpt_neox(layers=16, width=2048, heads=8)


def pythia_1_4b() -> Decoder:
    """1,414,647,808 parameters."""
    return gpt_neox(layers=24, width=2048, heads=16)


_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
_QKV_BIAS = ("layers/attn/q_bias", "layers/attn/k_bias", "layers/attn/v_bias")
_LAYER = "gpt_neox.layers.{}"
HF = (
    Row("embed/table", "gpt_neox.embed_in.weight", "v d -> v d"),
    Row("layers/attn_norm/scale", f"{_LAYER}.input_layernorm.weight", "d -> d"),
    Row("layers/attn_norm/bias", f"{_LAYER}.input_layernorm.bias", "d -> d"),
    Row(_QKV, f"{_LAYER}.attention.query_key_value.weight", "(h n k) d -> n d h k"),
    Row(_QKV_BIAS, f"{_LAYER}.attention.query_key_value.bias", "(h n k) -> n h k"),
    Row("layers/attn/o", f"{_LAYER}.attention.dense.weight", "d (h k) -> h k d"),
    Row("layers/attn/o_bias", f"{_LAYER}.attention.dense.bias", "d -> d"),
    Row("layers/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", "d -> d"),
    Row("layers/mlp_norm/bias", f"{_LAYER}.post_attention_layernorm.bias", "d -> d"),
    Row("layers/mlp/up", f"{_LAYER}.mlp.dense_h_to_4h.weight", "f d -> d f"),
    Row("layers/mlp/up_bias", f"{_LAYER}.mlp.dense_h_to_4h.bias", "f -> f"),
    Row("layers/mlp/down", f"{_LAYER}.mlp.dense_4h_to_h.weight", "d f -> f d"),
    Row("layers/mlp/down_bias", f"{_LAYER}.mlp.dense_4h_to_h.bias", "d -> d"),
    Row("final_norm/scale", "gpt_neox.final_layer_norm.weight", "d -> d"),
    Row("final_norm/bias", "gpt_neox.final_layer_norm.bias", "d -> d"),
    Row("unembed/table", "embed_out.weight", "v d -> v d", alias="lm_head.weight"),
)
"""Parameters as GPTNeoXForCausalLM saves them: q, k and v lie side by side in each head. The output table is `lm_head`
in the live model of transformers 5, `embed_out` in its files and in those of 4."""


def rows(decoder: Decoder) -> tuple[Row, ...]:
    """The rows of `HF` whose parameters this decoder has."""
    return present(HF, decoder)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The GPTNeoXConfig of this decoder, with the keys of transformers 4 beside those of 5; None if there is none."""
    block = decoder.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)):
        return None
    position = mixer.position
    if not isinstance(position, Rope) or decoder.width % mixer.heads or activation_name(mlp.activation) is None:
        return None
    parameters = rope_to_config(position)
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": mlp.hidden,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": decoder.context,
        "initializer_range": decoder.initial.std,
        "layer_norm_eps": norm.eps,
        "tie_word_embeddings": decoder.tied,
        "use_parallel_residual": isinstance(block, Parallel),
        "attention_bias": mixer.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": position.fraction,
        "rotary_emb_base": position.theta,
        "rope_parameters": {**parameters, "partial_rotary_factor": position.fraction},  # its default is 0.25, not 1
        "use_cache": True,
    }
    return config if replace(from_config(config), initial=decoder.initial) == decoder else None


def from_config(config: Mapping[str, Any]) -> Decoder:
    """GPTNeoXConfig -> decoder. Absent fields have the defaults of GPTNeoXConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    context = fields.take("max_position_embeddings", int, 2048)
    decoder = gpt_neox(
        layers=fields.take("num_hidden_layers", int, 44),
        width=fields.take("hidden_size", int, 6144),
        heads=fields.take("num_attention_heads", int, 64),
        hidden=fields.take("intermediate_size", int, 24576),
        vocab=fields.take("vocab_size", int, 50432),
        context=context,
        tied=fields.take("tie_word_embeddings", bool, False),
        position=rope_from_config(
            fields,
            fraction=0.25,
            fraction_keys=("partial_rotary_factor", "rotary_pct"),
            theta_keys=("rope_theta", "rotary_emb_base"),
            context=context,
        ),
        eps=fields.take("layer_norm_eps", (float, int), 1e-5),
        activation=fields.activation("hidden_act", "gelu"),
        attention_bias=fields.take("attention_bias", bool, True),
        wiring=Parallel if fields.take("use_parallel_residual", bool, True) else Block,
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(decoder, initial=Initial(std=std))


FAMILY = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    sizes={
        "pythia/14m": pythia_14m,
        "pythia/31m": pythia_31m,
        "pythia/70m": pythia_70m,
        "pythia/160m": pythia_160m,
        "pythia/410m": pythia_410m,
        "pythia/1b": pythia_1b,
        "pythia/1.4b": pythia_1_4b,
    },
)
