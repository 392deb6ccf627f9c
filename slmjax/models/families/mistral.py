"""Mistral and Mistral NeMo: Llama with a sliding window and heads of any width. Jiang et al. 2023, arXiv:2310.06825."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import LLAMA, Sizes, common_config, sizes_from, whole_rope
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope


def mistral(sizes: Sizes, *, position: Rope, window: int | None = None) -> Decoder:
    """A token sees itself and `window` - 1 tokens before it; None: all tokens before it. No biases."""
    return sizes.decoder([sizes.block(position, RMSNorm(eps=sizes.eps), window=window)] * sizes.layers)


def mistral_7b_v0_1() -> Decoder:
    """7,241,732,096 parameters."""
    sizes = Sizes(layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, vocab=32000, context=32768)
    return mistral(sizes, position=Rope(theta=1e4), window=4096)


def mistral_7b_v0_3() -> Decoder:
    """7,248,023,552 parameters."""
    sizes = Sizes(layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, vocab=32768, context=32768)
    return mistral(sizes, position=Rope(theta=1e6))


def mistral_nemo_12b() -> Decoder:
    """12,247,782,400 parameters."""
    sizes = Sizes(layers=40, width=5120, heads=32, kv_heads=8, head_dim=128, hidden=14336, vocab=131072, context=131072)
    return mistral(sizes, position=Rope(theta=1e6))


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The MistralConfig of this decoder; None if there is none."""
    common = common_config(decoder, "MistralForCausalLM", "mistral")
    if common is None:
        return None
    config = {**common.config, **both_versions(common.rope), "sliding_window": common.mixers[0].window}
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(
    layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, vocab=32000, context=131072, tied=False, eps=1e-6
)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """MistralConfig -> decoder. Absent fields have the defaults of MistralConfig: a window of 4096, too.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    window = fields.nullable("sliding_window", int, 4096)
    return finished(fields, mistral(sizes, position=whole_rope(fields, sizes.context), window=window))


FAMILY = Family(
    name="Mistral",
    model_type="mistral",
    rows=table(LLAMA),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "mistral/7b-v0.1": mistral_7b_v0_1,
        "mistral/7b-v0.3": mistral_7b_v0_3,
        "mistral/nemo-12b": mistral_nemo_12b,
    },
)
