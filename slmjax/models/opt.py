"""OPT, and Galactica in its class. Zhang et al. 2022, arXiv:2205.01068; Taylor et al. 2022, arXiv:2211.09085."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.table import Family, Row, present
from slmjax.nn.attention import Attention
from slmjax.nn.block import AnyBlock, PostNorm
from slmjax.nn.layer import Initial
from slmjax.nn.mlp import MLP, gelu, relu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Learned, NoPosition


def opt(
    *,
    layers: int,
    width: int,
    heads: int,
    hidden: int | None = None,
    vocab: int = 50272,
    context: int = 2048,
    table_width: int | None = None,
    tied: bool = True,
    activation: Callable = relu,
    bias: bool = True,
    affine: bool = True,
    wiring: type[AnyBlock] = Block,
    final_norm: bool = True,
) -> Decoder:
    """Pre-norm LayerNorm, multi-head attention, learned positions from row 2 on, a ReLU MLP, biases everywhere.

    Args:
        table_width: of the tables, where it is not `width` (350m).
        affine: whether norms have a gain and a bias.
        wiring: `PostNorm` for 350m, which has no final norm.
    """
    mixer = Attention(
        heads=heads, kv_heads=heads, head_dim=width // heads, qkv_bias=bias, o_bias=bias, position=NoPosition()
    )
    norm = LayerNorm(eps=1e-5, gain=affine, bias=affine)  # OPTConfig has no field for it
    mlp = MLP(hidden=4 * width if hidden is None else hidden, activation=activation, bias=bias)
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=(wiring(mixer=mixer, mlp=mlp, norm=norm),),
        repeats=layers,
        context=context,
        tied=tied,
        final_norm=norm if final_norm else None,
        position=Learned(offset=2),
        table_width=None if table_width == width else table_width,
    )


def opt_125m() -> Decoder:
    """125,239,296 parameters."""
    return opt(layers=12, width=768, heads=12)


def opt_350m() -> Decoder:
    """331,196,416 parameters."""
    return opt(layers=24, width=1024, heads=16, table_width=512, wiring=PostNorm, final_norm=False)


def opt_1_3b() -> Decoder:
    """1,315,758,080 parameters."""
    return opt(layers=24, width=2048, heads=32)


def galactica_125m() -> Decoder:
    """125,030,400 parameters."""
    return opt(layers=12, width=768, heads=12, vocab=50000, activation=gelu)


def galactica_1_3b() -> Decoder:
    """1,315,201,024 parameters."""
    return opt(layers=24, width=2048, heads=32, vocab=50000, activation=gelu)


_DECODER, _LAYER = "model.decoder", "model.decoder.layers.{}"
_ATTENTION = f"{_LAYER}.self_attn"
HF = (
    Row("embed/table", f"{_DECODER}.embed_tokens.weight", "v d -> v d"),
    Row("embed/positions", f"{_DECODER}.embed_positions.weight", "c d -> c d"),
    Row("embed/project", f"{_DECODER}.project_in.weight", "d p -> p d"),
    Row("layers/attn_norm/scale", f"{_LAYER}.self_attn_layer_norm.weight", "d -> d"),
    Row("layers/attn_norm/bias", f"{_LAYER}.self_attn_layer_norm.bias", "d -> d"),
    Row("layers/attn/q", f"{_ATTENTION}.q_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/k", f"{_ATTENTION}.k_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/v", f"{_ATTENTION}.v_proj.weight", "(h k) d -> d h k"),
    Row("layers/attn/o", f"{_ATTENTION}.out_proj.weight", "d (h k) -> h k d"),
    Row("layers/attn/q_bias", f"{_ATTENTION}.q_proj.bias", "(h k) -> h k"),
    Row("layers/attn/k_bias", f"{_ATTENTION}.k_proj.bias", "(h k) -> h k"),
    Row("layers/attn/v_bias", f"{_ATTENTION}.v_proj.bias", "(h k) -> h k"),
    Row("layers/attn/o_bias", f"{_ATTENTION}.out_proj.bias", "d -> d"),
    Row("layers/mlp_norm/scale", f"{_LAYER}.final_layer_norm.weight", "d -> d"),
    Row("layers/mlp_norm/bias", f"{_LAYER}.final_layer_norm.bias", "d -> d"),
    Row("layers/mlp/up", f"{_LAYER}.fc1.weight", "f d -> d f"),
    Row("layers/mlp/up_bias", f"{_LAYER}.fc1.bias", "f -> f"),
    Row("layers/mlp/down", f"{_LAYER}.fc2.weight", "d f -> f d"),
    Row("layers/mlp/down_bias", f"{_LAYER}.fc2.bias", "d -> d"),
    Row("final_norm/scale", f"{_DECODER}.final_layer_norm.weight", "d -> d"),
    Row("final_norm/bias", f"{_DECODER}.final_layer_norm.bias", "d -> d"),
    Row("project_out/weight", f"{_DECODER}.project_out.weight", "p d -> d p"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as OPTForCausalLM saves them; a layer's `final_layer_norm` is the norm of its MLP"""


def rows(decoder: Decoder) -> tuple[Row, ...]:
    """The rows of `HF` whose parameters this decoder has."""
    return present(HF, decoder)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The OPTConfig of this decoder, or None if there is none."""
    block = decoder.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)):
        return None
    if decoder.width % mixer.heads or activation_name(mlp.activation) is None:
        return None
    before = isinstance(block, Block)
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "ffn_dim": mlp.hidden,
        "max_position_embeddings": decoder.context,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and decoder.final_norm is None,
        "word_embed_proj_dim": decoder.table_width or decoder.width,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "num_attention_heads": mixer.heads,
        "activation_function": activation_name(mlp.activation),
        "layerdrop": 0.0,
        "init_std": decoder.initial.std,
        "enable_bias": mlp.bias,
        "layer_norm_elementwise_affine": norm.gain,
        "tie_word_embeddings": decoder.tied,
        "use_cache": True,
    }
    return config if replace(from_config(config), initial=decoder.initial) == decoder else None


def from_config(config: Mapping[str, Any]) -> Decoder:
    """OPTConfig -> decoder. Absent fields have the defaults of OPTConfig.

    Raises:
        UserError: a field that has no counterpart here, by name.
    """
    # `Fields` passes over keys with an underscore, which are private elsewhere; this one changes the model.
    fields = Fields({**config, "remove_final_layer_norm": config.get("_remove_final_layer_norm")})
    before = fields.take("do_layer_norm_before", bool, True)
    removed = fields.take("remove_final_layer_norm", bool, False)
    # Galactica's files speak of two features that it does not use differently from OPT.
    fields.expect("learned_embeddings", True)
    fields.expect("scale_embeddings", False)
    decoder = opt(
        layers=fields.take("num_hidden_layers", int, 12),
        width=fields.take("hidden_size", int, 768),
        heads=fields.take("num_attention_heads", int, 12),
        hidden=fields.take("ffn_dim", int, 3072),
        vocab=fields.take("vocab_size", int, 50272),
        context=fields.take("max_position_embeddings", int, 2048),
        table_width=fields.take("word_embed_proj_dim", int, None),
        tied=fields.take("tie_word_embeddings", bool, True),
        activation=fields.activation("activation_function", "relu"),
        bias=fields.take("enable_bias", bool, True),
        affine=fields.take("layer_norm_elementwise_affine", bool, True),
        wiring=Block if before else PostNorm,
        final_norm=before and not removed,
    )
    std = fields.take("init_std", (float, int), 0.02)
    fields.close()
    return replace(decoder, initial=Initial(std=std))


FAMILY = Family(
    name="OPT",
    model_type="opt",
    rows=rows,
    to_config=to_config,
    from_config=from_config,
    sizes={
        "opt/125m": opt_125m,
        "opt/350m": opt_350m,
        "opt/1.3b": opt_1_3b,
        "galactica/125m": galactica_125m,
        "galactica/1.3b": galactica_1_3b,
    },
)
