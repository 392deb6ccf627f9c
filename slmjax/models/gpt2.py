"""GPT-2. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu_tanh
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Learned, NoPosition


def gpt2(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50257,
    context: int = 1024,
    hidden: int | None = None,
    tied: bool = True,
    eps: float = 1e-5,
    activation: Callable = gelu_tanh,
    scale: float | None = None,
) -> Decoder:
    """Pre-norm LayerNorm, multi-head attention, learned positions, a GELU MLP of 4 widths, biases everywhere."""
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        qkv_bias=True,
        o_bias=True,
        position=NoPosition(),
        scale=scale,
    )
    norm = LayerNorm(eps=eps)
    mlp = MLP(hidden=4 * width if hidden is None else hidden, activation=activation, bias=True)
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=(Block(mixer=mixer, mlp=mlp, norm=norm),),
        repeats=layers,
        context=context,
        tied=tied,
        final_norm=norm,
        position=Learned(),
    )


def gpt2_small() -> Decoder:
    """124,439,808 parameters."""
    return gpt2(layers=12, width=768, heads=12)


def gpt2_medium() -> Decoder:
    """354,823,168 parameters."""
    return gpt2(layers=24, width=1024, heads=16)


def gpt2_large() -> Decoder:
    """774,030,080 parameters."""
    return gpt2(layers=36, width=1280, heads=20)


def gpt2_xl() -> Decoder:
    """1,557,611,200 parameters."""
    return gpt2(layers=48, width=1600, heads=25)


_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
_QKV_BIAS = ("layers/attn/q_bias", "layers/attn/k_bias", "layers/attn/v_bias")
_LAYER = "transformer.h.{}"
HF = (
    Row("embed/table", "transformer.wte.weight", "v d -> v d"),
    Row("embed/positions", "transformer.wpe.weight", "c d -> c d"),
    Row("layers/attn_norm/scale", f"{_LAYER}.ln_1.weight", "d -> d"),
    Row("layers/attn_norm/bias", f"{_LAYER}.ln_1.bias", "d -> d"),
    Row(_QKV, f"{_LAYER}.attn.c_attn.weight", "d (h k) -> d h k", split=1),
    Row(_QKV_BIAS, f"{_LAYER}.attn.c_attn.bias", "(h k) -> h k", split=0),
    Row("layers/attn/o", f"{_LAYER}.attn.c_proj.weight", "(h k) d -> h k d"),
    Row("layers/attn/o_bias", f"{_LAYER}.attn.c_proj.bias", "d -> d"),
    Row("layers/mlp_norm/scale", f"{_LAYER}.ln_2.weight", "d -> d"),
    Row("layers/mlp_norm/bias", f"{_LAYER}.ln_2.bias", "d -> d"),
    Row("layers/mlp/up", f"{_LAYER}.mlp.c_fc.weight", "d f -> d f"),
    Row("layers/mlp/up_bias", f"{_LAYER}.mlp.c_fc.bias", "f -> f"),
    Row("layers/mlp/down", f"{_LAYER}.mlp.c_proj.weight", "f d -> f d"),
    Row("layers/mlp/down_bias", f"{_LAYER}.mlp.c_proj.bias", "d -> d"),
    Row("final_norm/scale", "transformer.ln_f.weight", "d -> d"),
    Row("final_norm/bias", "transformer.ln_f.bias", "d -> d"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as GPT2LMHeadModel saves them: Conv1D weights lie [in, out], and c_attn is q, k, v side by side"""


def rows(decoder: Decoder) -> tuple[Row, ...]:
    """The rows of `HF` whose parameters this decoder has."""
    return present(HF, decoder)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The GPT2Config of this decoder, or None if there is none."""
    block = decoder.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)):
        return None
    if decoder.position is None or decoder.width % mixer.heads or activation_name(mlp.activation) is None:
        return None
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": decoder.vocab,
        "n_positions": decoder.context,
        "n_ctx": decoder.context,
        "n_embd": decoder.width,
        "n_layer": decoder.layers,
        "n_head": mixer.heads,
        "n_inner": mlp.hidden,
        "activation_function": activation_name(mlp.activation),
        "layer_norm_epsilon": norm.eps,
        "initializer_range": decoder.initial.std,
        "scale_attn_weights": mixer.scale is None,
        "tie_word_embeddings": decoder.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "use_cache": True,
    }
    return config if replace(from_config(config), initial=decoder.initial) == decoder else None


def from_config(config: Mapping[str, Any]) -> Decoder:
    """GPT2Config -> decoder. Absent fields have the defaults of GPT2Config.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    fields = Fields(config)
    width = fields.take("n_embd", int, 768)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    decoder = gpt2(
        layers=fields.take("n_layer", int, 12),
        width=width,
        heads=fields.take("n_head", int, 12),
        vocab=fields.take("vocab_size", int, 50257),
        context=fields.take("n_positions", int, 1024),
        hidden=fields.take("n_inner", int, 4 * width),
        tied=fields.take("tie_word_embeddings", bool, True),
        eps=fields.take("layer_norm_epsilon", (float, int), 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        scale=None if fields.take("scale_attn_weights", bool, True) else 1.0,
    )
    std = fields.take("initializer_range", (float, int), 0.02)
    fields.close()
    return replace(decoder, initial=Initial(std=std))


FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    sizes={
        "gpt2/small": gpt2_small,
        "gpt2/medium": gpt2_medium,
        "gpt2/large": gpt2_large,
        "gpt2/xl": gpt2_xl,
    },
)
