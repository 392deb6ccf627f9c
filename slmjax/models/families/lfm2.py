"""LFM2: gated short convolutions, and grouped-query attention in between. Liquid AI 2025, arXiv:2511.23404."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.errors import UserError
from slmjax.models.arrange import layers_of
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, exact, finished
from slmjax.models.families.common.rope_fields import both_versions, rope_from_config
from slmjax.models.families.common.rows import Family, Row, attention_rows, dense_rows, table
from slmjax.nn.attention import Attention, QKNorm
from slmjax.nn.mlp import SwiGLU
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope
from slmjax.nn.short_conv import ShortConv

KINDS = {"full_attention": Attention, "conv": ShortConv}


def lfm2(
    *,
    attends: Sequence[bool],
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    vocab: int = 65536,
    context: int = 128000,
    tied: bool = True,
    position: Rope = Rope(theta=1e6),  # noqa: B008
    head_dim: int | None = None,
    taps: int = 3,
    conv_bias: bool = False,
    eps: float = 1e-5,
) -> Decoder:
    """Pre-norm RMSNorm and SwiGLU; each layer is attention (RoPE, queries and keys normed) or a convolution.

    Args:
        attends: for each layer, whether it is attention.
    """
    norm = RMSNorm(eps=eps)
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        position=position,
        qk_norm=QKNorm(norm=norm),
    )
    conv = ShortConv(channels=width, taps=taps, bias=conv_bias)
    blocks = [Block(mixer=attention if yes else conv, mlp=SwiGLU(hidden=hidden), norm=norm) for yes in attends]
    return Decoder(vocab=vocab, width=width, context=context, tied=tied, final_norm=norm, **layers_of(blocks))


def _published(layers: int, attending: tuple[int, ...], *, width: int, heads: int, hidden: int) -> Decoder:
    attends = [i in attending for i in range(layers)]
    return lfm2(attends=attends, width=width, heads=heads, kv_heads=8, hidden=hidden)


def lfm2_350m() -> Decoder:
    """354,483,968 parameters."""
    return _published(16, (2, 5, 8, 10, 12, 14), width=1024, heads=16, hidden=4608)


def lfm2_700m() -> Decoder:
    """742,489,344 parameters."""
    return _published(16, (2, 5, 8, 10, 12, 14), width=1536, heads=24, hidden=6912)


def lfm2_1_2b() -> Decoder:
    """1,170,340,608 parameters."""
    return _published(16, (2, 5, 8, 10, 12, 14), width=2048, heads=32, hidden=8192)


def lfm2_2_6b() -> Decoder:
    """2,569,272,320 parameters."""
    return _published(30, (2, 5, 9, 13, 17, 21, 24, 27), width=2048, heads=32, hidden=10752)


_ATTENTION, _CONV, _MLP = (f"model.layers.{{}}.{name}" for name in ("self_attn", "conv", "feed_forward"))
_GATES = ("layers/conv/b", "layers/conv/c", "layers/conv/x")
HF = (
    Row("embed/table", "model.embed_tokens.weight", "v d -> v d"),
    Row("layers/attn_norm/scale", "model.layers.{}.operator_norm.weight", "d -> d"),
    Row("layers/conv_norm/scale", "model.layers.{}.operator_norm.weight", "d -> d"),
    *attention_rows(_ATTENTION, "q_proj", "k_proj", "v_proj", "out_proj"),
    Row("layers/attn/q_norm/scale", f"{_ATTENTION}.q_layernorm.weight", "k -> k"),
    Row("layers/attn/k_norm/scale", f"{_ATTENTION}.k_layernorm.weight", "k -> k"),
    Row(_GATES, f"{_CONV}.in_proj.weight", "c d -> d c", split=0),
    Row(tuple(f"{path}_bias" for path in _GATES), f"{_CONV}.in_proj.bias", "c -> c", split=0),
    Row("layers/conv/taps", f"{_CONV}.conv.weight", "c 1 t -> c t"),
    Row("layers/conv/taps_bias", f"{_CONV}.conv.bias", "c -> c"),
    *dense_rows("layers/conv/out", f"{_CONV}.out_proj"),
    Row("layers/mlp_norm/scale", "model.layers.{}.ffn_norm.weight", "d -> d"),
    Row("layers/mlp/gate", f"{_MLP}.w1.weight", "f d -> d f"),
    Row("layers/mlp/up", f"{_MLP}.w3.weight", "f d -> d f"),
    Row("layers/mlp/down", f"{_MLP}.w2.weight", "d f -> f d"),
    Row("final_norm/scale", "model.embedding_norm.weight", "d -> d"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as Lfm2ForCausalLM saves them"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Lfm2Config of this decoder, or None if there is none."""
    mixers = [block.mixer for block in decoder.blocks()]
    attention = next((m for m in mixers if isinstance(m, Attention)), None)
    conv = next((m for m in mixers if isinstance(m, ShortConv)), None)
    mlp, norm = decoder.pattern[0].mlp, decoder.final_norm
    if attention is None or conv is None or not isinstance(attention.position, Rope):
        return None  # with attention in every layer it is exported as Qwen 3
    config = {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "intermediate_size": getattr(mlp, "hidden", 0),
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "layer_types": [next((k for k, kind in KINDS.items() if isinstance(m, kind)), "") for m in mixers],
        "conv_L_cache": conv.taps,
        "conv_bias": conv.bias,
        "max_position_embeddings": decoder.context,
        "initializer_range": decoder.initial.stated,
        "norm_eps": getattr(norm, "eps", 0.0),
        "tie_word_embeddings": decoder.tied,
        **both_versions(attention.position),
        "use_cache": True,
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Lfm2Config -> decoder. Absent fields have the defaults of Lfm2Config; older names of its fields are read too.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    width = fields.take("hidden_size", int, 2560)
    heads = fields.take("num_attention_heads", int, 32)
    eps = fields.take("norm_eps", NUMBER, 1e-5)
    context = fields.take("max_position_embeddings", int, 128000)
    position = rope_from_config(fields, theta=1e6, context=context)
    if position.fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor = {position.fraction} is not supported; only 1.0 is")
    tied = fields.take("tie_embedding", bool, None)
    decoder = lfm2(
        attends=_attends(fields),
        width=width,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int, 8),
        head_dim=fields.take("head_dim", int, width // heads),
        hidden=_hidden(fields),
        vocab=fields.take("vocab_size", int, 65536),
        context=context,
        tied=fields.take("tie_word_embeddings", bool, True) if tied is None else tied,
        position=position,
        taps=fields.take("conv_L_cache", int, 3),
        conv_bias=fields.take("conv_bias", bool, False),
        eps=eps,
    )
    # Fields that the first release wrote and the class does not read: they must agree with the others.
    repeated = {
        "block_dim": width,
        "conv_dim": width,
        "conv_dim_out": width,
        "num_heads": heads,
        "block_norm_eps": eps,
    }
    for key, value in {**repeated, "theta": position.theta, "block_use_swiglu": True, "use_pos_enc": True}.items():
        fields.expect(key, value)
    for key in ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"):
        fields.take(key, (float, int, bool), None)  # initial values only
    if tied is not None:
        fields.expect("tie_word_embeddings", tied)
    return finished(fields, decoder)


def _attends(fields: Fields) -> list[bool]:
    """Whether each layer is attention: by `layer_types`, or by the indices in `full_attn_idxs`."""
    layers = fields.take("num_hidden_layers", int, 32)
    types = fields.take("layer_types", (list, tuple), None)
    indices = fields.take("full_attn_idxs", (list, tuple), None)
    named = None if indices is None else [i in indices for i in range(layers)]
    if types is None:
        return [True] * layers if named is None else named
    if len(types) != layers or not set(types) <= set(KINDS):
        raise UserError(f"config.json: layer_types = {types} is not {layers} times {' or '.join(KINDS)}")
    found = [kind == "full_attention" for kind in types]
    if named not in (None, found):
        raise UserError("config.json: layer_types and full_attn_idxs differ; remove one of them")
    return found


def _hidden(fields: Fields) -> int:
    """Width of the feed-forward layers: two thirds of the config's value, times a factor, rounded up."""
    size = fields.take("intermediate_size", int, None)
    older = fields.take("block_ff_dim", int, size)
    if size not in (None, older):
        raise UserError(f"config.json: intermediate_size = {size} but block_ff_dim = {older}; remove one of them")
    size = 12288 if older is None else older
    multiple = fields.take("block_multiple_of", int, 256)
    factor = fields.take("block_ffn_dim_multiplier", NUMBER, 1.0)
    if not fields.take("block_auto_adjust_ff_dim", bool, True):
        return size
    return -(-int(factor * int(2 * size / 3)) // multiple) * multiple


FAMILY = Family(
    name="LFM2",
    model_type="lfm2",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"lfm2/350m": lfm2_350m, "lfm2/700m": lfm2_700m, "lfm2/1.2b": lfm2_1_2b, "lfm2/2.6b": lfm2_2_6b},
)
