"""What GPT-2 and families like it, BERT included, have in common: a layer, its parts and its rows.

Multi-head attention, a plain MLP, LayerNorm, biases. The file of a family says where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from slmjax.models.assembly import Assembly
from slmjax.models.families.common.config_fields import activation_name
from slmjax.models.families.common.rows import QKV, QKV_BIAS, Row, dense_rows, norm_rows, out_rows
from slmjax.nn.attention import Attention
from slmjax.nn.block import AnyBlock, Block
from slmjax.nn.mlp import MLP
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import NoPosition, Position


def gpt_block(
    *,
    width: int,
    heads: int,
    hidden: int | None,
    norm: LayerNorm,
    activation: Callable,
    kind: type[AnyBlock] = Block,
    position: Position = NoPosition(),  # noqa: B008
    attention_bias: bool = True,
    mlp_bias: bool = True,
    **attention: Any,
) -> AnyBlock:
    """One layer. `hidden` None: 4 * `width`. `attention`: further fields of `Attention`."""
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        position=position,
        **attention,
    )
    mlp = MLP(hidden=4 * width if hidden is None else hidden, activation=activation, bias=mlp_bias)
    return kind(mixer=mixer, mlp=mlp, norm=norm)


class Parts(NamedTuple):
    """The parts of the first layer."""

    mixer: Attention
    mlp: MLP
    norm: LayerNorm


def parts(model: Assembly) -> Parts | None:
    """The parts of the first layer; None if they are of other classes, the heads do not divide the width, or
    transformers has no name for the activation."""
    block = model.pattern[0]
    mixer, mlp, norm = block.mixer, block.mlp, block.norm
    if not (isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)):
        return None
    if model.width % mixer.heads or activation_name(mlp.activation) is None:
        return None
    return Parts(mixer, mlp, norm)


def megatron_rows(layer: str, attention: str) -> tuple[Row, ...]:
    """Rows of a layer as Megatron stores it: one tensor holds queries, keys and values, side by side for each head.

    Args:
        layer: prefix of the layer's keys.
        attention: name of the attention below that prefix.
    """
    fused = f"{layer}.{attention}.query_key_value"
    return (
        *norm_rows("layers/attn_norm", f"{layer}.input_layernorm"),
        Row(QKV, f"{fused}.weight", "(h n k) d -> n d h k"),
        Row(QKV_BIAS, f"{fused}.bias", "(h n k) -> n h k"),
        *out_rows(f"{layer}.{attention}.dense"),
        *norm_rows("layers/mlp_norm", f"{layer}.post_attention_layernorm"),
        *dense_rows("layers/mlp/up", f"{layer}.mlp.dense_h_to_4h"),
        *dense_rows("layers/mlp/down", f"{layer}.mlp.dense_4h_to_h"),
    )
