"""StableLM: Llama with LayerNorm, rotary positions on a part of each head, and branches side by side in the largest.

Tow et al. 2023 (StableLM-3B-4E1T); Bellagente et al. 2024, arXiv:2402.17834.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import LLAMA, Sizes, common_config, divided, sizes_from
from slmjax.models.families.common.rope_fields import both_versions, rope_from_config
from slmjax.models.families.common.rows import Family, Row, table
from slmjax.nn.attention import QKNorm
from slmjax.nn.block import ParallelShared
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Rope

FRACTION = 0.25
"""Default fraction of each head's channels that is rotated"""


def stablelm(
    sizes: Sizes, *, position: Rope, qkv_bias: bool = False, qk_norm: bool = False, parallel: bool = False
) -> Decoder:
    """`qk_norm`: a LayerNorm without bias, with a gain for each head. `parallel`: attention and MLP in parallel,
    with one norm for both."""
    block = sizes.block(
        position,
        LayerNorm(eps=sizes.eps),
        kind=ParallelShared if parallel else Block,
        qkv_bias=qkv_bias,
        qk_norm=QKNorm(norm=LayerNorm(eps=sizes.eps, bias=False), gain_per_head=True) if qk_norm else None,
    )
    return sizes.decoder([block] * sizes.layers)


def stablelm_3b_4e1t() -> Decoder:
    """2,795,443,200 parameters."""
    sizes = Sizes(layers=32, width=2560, heads=32, hidden=6912, vocab=50304, context=4096)
    return stablelm(sizes, position=Rope(theta=1e4, fraction=FRACTION))


def stablelm_2_1_6b() -> Decoder:
    """1,644,515,328 parameters."""
    sizes = Sizes(layers=24, width=2048, heads=32, hidden=5632, vocab=100352, context=4096)
    return stablelm(sizes, position=Rope(theta=1e4, fraction=FRACTION), qkv_bias=True)


def stablelm_2_12b() -> Decoder:
    """12,143,185,920 parameters."""
    sizes = Sizes(layers=40, width=5120, heads=32, kv_heads=8, hidden=13824, vocab=100352, context=4096)
    return stablelm(sizes, position=Rope(theta=1e4, fraction=FRACTION), qk_norm=True, parallel=True)


_ATTENTION = "model.layers.{}.self_attn"
HF = (
    *LLAMA,
    Row("layers/attn/q_norm/scale", f"{_ATTENTION}.q_layernorm.norms.{{each}}.weight", "k -> h k", each="h"),
    Row("layers/attn/k_norm/scale", f"{_ATTENTION}.k_layernorm.norms.{{each}}.weight", "k -> h k", each="h"),
)
"""Parameters as StableLmForCausalLM saves them"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The StableLmConfig of this decoder; None if there is none."""
    common = common_config(decoder, "StableLmForCausalLM", "stablelm", eps="layer_norm_eps", head_dim=False)
    if common is None:
        return None
    fraction = {"partial_rotary_factor": common.rope.fraction}  # the default of the class is a quarter
    versions = both_versions(common.rope)
    config = {
        **common.config,
        **versions,
        **fraction,
        "rope_parameters": {**versions["rope_parameters"], **fraction},
        "use_qkv_bias": common.mixers[0].qkv_bias,
        "qk_layernorm": common.mixers[0].qk_norm is not None,
        "use_parallel_residual": isinstance(decoder.pattern[0], ParallelShared),
        "hidden_dropout": 0.0,
    }
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(
    layers=32, width=2560, heads=32, kv_heads=32, hidden=6912, vocab=50304, context=4096, tied=False, eps=1e-5
)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """StableLmConfig -> decoder. Absent fields have the defaults of StableLmConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = divided(sizes_from(fields, DEFAULTS, eps="layer_norm_eps"))
    decoder = stablelm(
        sizes,
        position=rope_from_config(fields, fraction=FRACTION, context=sizes.context),
        qkv_bias=fields.take("use_qkv_bias", bool, False),
        qk_norm=fields.take("qk_layernorm", bool, False),
        parallel=fields.take("use_parallel_residual", bool, False),
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="StableLM",
    model_type="stablelm",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "stablelm/3b-4e1t": stablelm_3b_4e1t,
        "stablelm/2-1.6b": stablelm_2_1_6b,
        "stablelm/2-12b": stablelm_2_12b,
    },
)
