"""OpenELM: layers that widen with depth. Mehta et al. 2024, arXiv:2404.14619, section 2.1.

Its class is remote code, which is never run: weights can be imported but not exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slmjax.errors import UserError
from slmjax.models.arrange import layers_of
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, finished
from slmjax.models.families.common.rows import QKV, Family, Row, table
from slmjax.nn.attention import Attention, QKNorm
from slmjax.nn.mlp import SwiGLU
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope

NORM = RMSNorm(eps=1e-6)


def openelm(
    *,
    heads: Sequence[int],
    hidden: Sequence[int],
    groups: int,
    width: int,
    head_dim: int,
    vocab: int = 32000,
    context: int = 2048,
    tied: bool = True,
    theta: float = 1e4,
    qk_norm: bool = True,
) -> Decoder:
    """Pre-norm RMSNorm, RoPE, SwiGLU; queries and keys normed per head.

    Args:
        heads, hidden: number of heads and width of the MLP, for each layer.
        groups: number of query heads that share a key head.
    """
    blocks = [
        Block(
            mixer=Attention(
                heads=h,
                kv_heads=h // groups,
                head_dim=head_dim,
                position=Rope(theta=theta),
                qk_norm=QKNorm(norm=NORM) if qk_norm else None,
            ),
            mlp=SwiGLU(hidden=f),
            norm=NORM,
        )
        for h, f in zip(heads, hidden, strict=True)
    ]
    return Decoder(vocab=vocab, width=width, context=context, tied=tied, final_norm=NORM, **layers_of(blocks))


def widths(width: int, multipliers: Sequence[float], multiple: int) -> list[int]:
    """width * multiplier of each layer, rounded to the nearest multiple of `multiple`, but up if rounding down would
    lose more than a tenth."""
    rounded = []
    for m in multipliers:
        wanted = width * m
        near = max(multiple, int(wanted + multiple / 2) // multiple * multiple)
        rounded.append(near + multiple if near < 0.9 * wanted else near)
    return rounded


def between(low: float, high: float, layers: int) -> list[float]:
    """From low to high in equal steps, each rounded to two decimals."""
    return [round(float(x), 2) for x in np.linspace(low, high, num=layers)]


def _published(layers: int, width: int, head_dim: int) -> Decoder:
    queries = widths(width, between(0.5, 1.0, layers), 4 * head_dim)
    return openelm(
        heads=[q // head_dim for q in queries],
        hidden=widths(width, between(0.5, 4.0, layers), 256),
        groups=4,
        width=width,
        head_dim=head_dim,
    )


def openelm_270m() -> Decoder:
    """271,527,168 parameters."""
    return _published(16, 1280, 64)


def openelm_450m() -> Decoder:
    """457,179,136 parameters."""
    return _published(20, 1536, 64)


def openelm_1_1b() -> Decoder:
    """1,079,891,456 parameters."""
    return _published(28, 2048, 64)


def openelm_3b() -> Decoder:
    """3,036,647,424 parameters."""
    return _published(36, 3072, 128)


_LAYER = "transformer.layers.{}"
HF = (
    Row("embed/table", "transformer.token_embeddings.weight", "v d -> v d"),
    Row("layers/attn_norm/scale", f"{_LAYER}.attn_norm.weight", "d -> d"),
    Row(QKV, f"{_LAYER}.attn.qkv_proj.weight", "(h k) d -> d h k", 0),
    Row("layers/attn/q_norm/scale", f"{_LAYER}.attn.q_norm.weight", "k -> k"),
    Row("layers/attn/k_norm/scale", f"{_LAYER}.attn.k_norm.weight", "k -> k"),
    Row("layers/attn/o", f"{_LAYER}.attn.out_proj.weight", "d (h k) -> h k d"),
    Row("layers/mlp_norm/scale", f"{_LAYER}.ffn_norm.weight", "d -> d"),
    Row(("layers/mlp/gate", "layers/mlp/up"), f"{_LAYER}.ffn.proj_1.weight", "f d -> d f", 0),
    Row("layers/mlp/down", f"{_LAYER}.ffn.proj_2.weight", "d f -> f d"),
    Row("final_norm/scale", "transformer.norm.weight", "d -> d"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as OpenELMForCausalLM saves them: queries, keys and values one after another, and gate before up"""


def from_config(config: Mapping[str, Any]) -> Decoder:
    """OpenELMConfig -> decoder. Absent fields have the defaults of that class.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    layers = fields.take("num_transformer_layers", int, 12)
    width = fields.take("model_dim", int, 2048)
    head_dim = fields.take("head_dim", int, 128)
    groups = fields.take("num_gqa_groups", int, 1)
    queries = widths(width, _multipliers(fields, "qkv_multipliers", 1.0, layers), head_dim * groups)
    hidden = _multipliers(fields, "ffn_multipliers", 4.0, layers)
    heads = [q // head_dim for q in queries]
    # Fields that a saved config repeats although the class computes them.
    for key, computed in (("num_query_heads", heads), ("num_kv_heads", [h // groups for h in heads])):
        stated = fields.take(key, (int, list, tuple), None)
        if isinstance(stated, list | tuple) and list(stated) != computed:
            raise UserError(f"config.json: {key} = {stated} is not what the multipliers give, {computed}")
    decoder = openelm(
        heads=heads,
        hidden=widths(width, hidden, fields.take("ffn_dim_divisor", int, 256)),
        groups=groups,
        width=width,
        head_dim=head_dim,
        vocab=fields.take("vocab_size", int, 32000),
        context=fields.take("max_context_length", int, 2048),
        tied=fields.take("share_input_output_layers", bool, False),
        theta=float(fields.take("rope_freq_constant", NUMBER, 1e4)),
        qk_norm=fields.take("normalize_qk_projections", bool, False),
    )
    fields.take("rope_max_length", int, None)  # length of the table of rotations in its code
    fields.expect("ffn_with_glu", True)
    fields.expect("activation_fn_name", "swish")
    fields.expect("normalization_layer_name", "rms_norm")
    return finished(fields, decoder)


def _multipliers(fields: Fields, key: str, default: float, layers: int) -> list[float]:
    """One multiplier for each layer. The field holds one number, the first and the last, or one for each layer."""
    given = fields.take(key, (float, int, list, tuple), default)
    if isinstance(given, float | int):
        return [given] * layers
    if len(given) == 2:
        return between(given[0], given[1], layers)
    if len(given) != layers:
        raise UserError(f"config.json: {key} has {len(given)} entries; expected 2, or one for each of {layers} layers")
    return list(given)


def refusal(decoder: Decoder) -> str | None:
    """Why a decoder whose layers are of unequal width is not exported."""
    shapes = {(getattr(b.mixer, "heads", None), getattr(b.mlp, "hidden", None)) for b in decoder.blocks()}
    if len({type(b.mixer) for b in decoder.blocks()}) > 1 or len(shapes) == 1:
        return None
    return (
        "layers differ in heads or hidden width, as in OpenELM: no class of stock transformers has such layers "
        "(OpenELM's own is remote code); give every layer the same width to export"
    )


FAMILY = Family(
    name="OpenELM",
    model_type="openelm",
    rows=table(HF),
    to_config=lambda decoder: None,
    from_config=from_config,
    sizes={
        "openelm/270m": openelm_270m,
        "openelm/450m": openelm_450m,
        "openelm/1.1b": openelm_1_1b,
        "openelm/3b": openelm_3b,
    },
    refusal=refusal,
)
