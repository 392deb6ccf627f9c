"""Gemma 2: norms before and after each branch, soft-capped scores and logits, windows in every other layer.

Gemma team 2024, arXiv:2408.00118, section 2. Norms multiply by 1 + w, and token vectors by sqrt(width).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.errors import UserError, positive
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, activation_name, exact, finished
from slmjax.models.families.common.llama_like import (
    ATTENTION,
    MLP,
    QK_NORMS,
    SANDWICH_NORMS,
    TABLES,
    Common,
    Sizes,
    common_config,
    layer_type_names,
    layer_windows,
    sizes_from,
    whole_rope,
)
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.block import AnyBlock, Sandwich
from slmjax.nn.embedding import Logits
from slmjax.nn.mlp import gelu_tanh
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope


def gemma2(
    sizes: Sizes,
    *,
    position: Rope,
    windows: Sequence[int | None],
    query_scalar: int = 256,
    score_cap: float | None = 50.0,
    logit_cap: float | None = 30.0,
    attention_bias: bool = False,
) -> Decoder:
    """`windows`: one for each layer. Scores are divided by the root of `query_scalar`, not of the width of a head."""
    blocks = [
        gemma_block(sizes, position, window, query_scalar, attention_bias, softcap=score_cap) for window in windows
    ]
    return sizes.decoder(blocks, embed_scale=math.sqrt(sizes.width), logits=Logits(softcap=logit_cap))


def gemma_norm(sizes: Sizes) -> RMSNorm:
    """The norm used everywhere in Gemma 2 and 3."""
    return RMSNorm(eps=sizes.eps, offset=1.0, round_first=False)


def gemma_block(
    sizes: Sizes, position: Rope, window: int | None, query_scalar: int, bias: bool, **attention: Any
) -> AnyBlock:
    """A layer of Gemma 2 or 3. `bias`: whether attention has biases. `attention`: further fields of `Attention`."""
    positive(query_pre_attn_scalar=query_scalar)
    scale = None if query_scalar == sizes.head_dim else query_scalar**-0.5  # None: the default scale is the same
    return sizes.block(
        position, gemma_norm(sizes), kind=Sandwich, window=window, scale=scale, qkv_bias=bias, o_bias=bias, **attention
    )


DEFAULTS = Sizes(
    layers=26, width=2304, heads=8, kv_heads=4, head_dim=256, hidden=9216, vocab=256000, context=8192, tied=True,
    eps=1e-6, activation=gelu_tanh,
)  # fmt: skip
"""The defaults of Gemma2Config, the sizes of Gemma 2 2B"""


def gemma2_2b() -> Decoder:
    """2,614,341,888 parameters."""
    return gemma2(DEFAULTS, position=Rope(theta=1e4), windows=(4096, None) * 13)


def gemma2_9b() -> Decoder:
    """9,241,705,984 parameters."""
    sizes = Sizes(
        layers=42, width=3584, heads=16, kv_heads=8, head_dim=256, hidden=14336, vocab=256000, context=8192, tied=True,
        eps=1e-6, activation=gelu_tanh,
    )  # fmt: skip
    return gemma2(sizes, position=Rope(theta=1e4), windows=(4096, None) * 21)


HF = (*TABLES, *SANDWICH_NORMS, *ATTENTION, *QK_NORMS, *MLP)
"""Parameters as Gemma2ForCausalLM saves them, and Gemma3ForCausalLM, which has the norms of queries and keys"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Gemma2Config of this decoder; None if there is none."""
    common = common_config(decoder, "Gemma2ForCausalLM", "gemma2", activation="hidden_activation")
    if common is None or decoder.width % common.mixers[0].heads:
        return None
    config = {
        **gemma_config(common, decoder),
        **both_versions(common.rope),
        "attn_logit_softcapping": common.mixers[0].softcap,
    }
    return exact(config, from_config, decoder)


def gemma_config(common: Common, decoder: Decoder) -> dict[str, Any]:
    """The config.json fields that Gemma 2 and 3 have in common."""
    first, activation = common.mixers[0], common.config["hidden_activation"]
    # transformers has two names for this function; Gemma's own files use the second.
    activation = "gelu_pytorch_tanh" if activation == "gelu_new" else activation
    windows = [mixer.window for mixer in common.mixers if mixer.window is not None]
    return {
        **common.config,
        "hidden_act": activation,
        "hidden_activation": activation,
        "query_pre_attn_scalar": first.head_dim if first.scale is None else round(first.scale**-2),
        "sliding_window": windows[0] if windows else 4096,  # the class requires one even if no layer uses it
        "layer_types": layer_type_names(common.mixers),
        "attention_bias": first.qkv_bias,
        "final_logit_softcapping": decoder.logits.softcap,
    }


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Gemma2Config -> decoder. Absent fields have the defaults of Gemma2Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = gemma_sizes(fields, DEFAULTS)
    length = fields.nullable("sliding_window", int, 4096)
    decoder = gemma2(
        sizes,
        position=whole_rope(fields, sizes.context),
        windows=layer_windows(fields, length, [i % 2 == 0 for i in range(sizes.layers)]),
        query_scalar=fields.take("query_pre_attn_scalar", int, 256),
        score_cap=fields.nullable("attn_logit_softcapping", NUMBER, 50.0),
        logit_cap=fields.nullable("final_logit_softcapping", NUMBER, 30.0),
        attention_bias=fields.take("attention_bias", bool, False),
    )
    return finished(fields, decoder)


def gemma_sizes(fields: Fields, defaults: Sizes) -> Sizes:
    """The sizes; also checks the other fields that Gemma 2 and 3 have in common.

    Raises:
        UserError: two fields name different activations, or attention is bidirectional.
    """
    sizes = sizes_from(fields, defaults, activation="hidden_activation")
    fields.expect("use_bidirectional_attention", False)
    if fields.activation("hidden_act", activation_name(sizes.activation) or "") is not sizes.activation:
        raise UserError("config.json: hidden_act and hidden_activation differ; remove hidden_act, which is not used")
    return sizes


FAMILY = Family(
    name="Gemma 2",
    model_type="gemma2",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"gemma2/2b": gemma2_2b, "gemma2/9b": gemma2_9b},
)
