"""OLMo 2: norms after the branches instead of before, and queries and keys normed over all heads together.

OLMo team 2024, arXiv:2501.00656, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import (
    ATTENTION,
    MLP,
    QK_NORMS,
    SANDWICH_NORMS,
    TABLES,
    Sizes,
    common_config,
    sizes_from,
    whole_rope,
)
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.attention import QKNorm
from slmjax.nn.block import AnyBlock, PostBranch
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope


def olmo2(sizes: Sizes, *, position: Rope, attention_bias: bool = False) -> Decoder:
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    return sizes.decoder([olmo2_block(sizes, position, attention_bias=attention_bias)] * sizes.layers)


def olmo2_block(sizes: Sizes, position: Rope, *, attention_bias: bool, window: int | None = None) -> AnyBlock:
    """One layer of OLMo 2 or 3."""
    norm = RMSNorm(eps=sizes.eps, round_first=False)
    return sizes.block(
        position,
        norm,
        kind=PostBranch,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=QKNorm(norm=norm, whole=True),
        window=window,
    )


def olmo2_1b() -> Decoder:
    """1,484,916,736 parameters."""
    sizes = Sizes(layers=16, width=2048, heads=16, hidden=8192, vocab=100352, context=4096, eps=1e-6)
    return olmo2(sizes, position=Rope(theta=5e5))


def olmo2_7b() -> Decoder:
    """7,298,617,344 parameters."""
    sizes = Sizes(layers=32, width=4096, heads=32, hidden=11008, vocab=100352, context=4096, eps=1e-6)
    return olmo2(sizes, position=Rope(theta=5e5))


# The gains of queries and keys are [H, K] in slmjax, one vector in transformers.
_QK_NORMS = tuple(row._replace(pattern="(h k) -> h k") for row in QK_NORMS)
HF = (*TABLES, *SANDWICH_NORMS, *ATTENTION, *_QK_NORMS, *MLP)
"""Parameters as Olmo2ForCausalLM saves them"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Olmo2Config of this decoder; None if there is none."""
    common = common_config(decoder, "Olmo2ForCausalLM", "olmo2")
    if common is None:
        return None
    config = {**common.config, **both_versions(common.rope), "attention_bias": common.mixers[0].qkv_bias}
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(layers=32, width=4096, heads=32, hidden=11008, vocab=50304, context=2048, eps=1e-5)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Olmo2Config -> decoder. Absent fields have the defaults of Olmo2Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    bias = fields.take("attention_bias", bool, False)
    return finished(fields, olmo2(sizes, position=whole_rope(fields, sizes.context), attention_bias=bias))


FAMILY = Family(
    name="OLMo 2",
    model_type="olmo2",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"olmo2/1b": olmo2_1b, "olmo2/7b": olmo2_7b},
)
