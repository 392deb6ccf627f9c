"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused projections, a window, and LongRoPE on all or a part of each head.

Abdin et al. 2024, arXiv:2404.14219; Abouelenin et al. 2025, arXiv:2503.01743.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import PRE_NORMS, TABLES, Sizes, common_config, divided, sizes_from
from slmjax.models.families.common.phi3_factors import PHI_3_5_MINI, PHI_4_MINI
from slmjax.models.families.common.rope_fields import both_versions, rope_from_config
from slmjax.models.families.common.rows import QKV, Family, Row, table
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import LongRope

ORIGINAL = 4096
"""Context of the first stage of training, unless a configuration says otherwise"""


def phi3(sizes: Sizes, *, position: Rope, window: int | None = None) -> Decoder:
    """No biases. `window` may be longer than the context, as in the published files, and then has no effect."""
    return sizes.decoder([sizes.block(position, RMSNorm(eps=sizes.eps), window=window)] * sizes.layers)


def phi3_mini_4k() -> Decoder:
    """3,821,079,552 parameters."""
    sizes = Sizes(layers=32, width=3072, heads=32, hidden=8192, vocab=32064, context=4096)
    return phi3(sizes, position=Rope(theta=1e4), window=2047)


def phi3_5_mini() -> Decoder:
    """3,821,079,552 parameters."""
    sizes = Sizes(layers=32, width=3072, heads=32, hidden=8192, vocab=32064, context=131072)
    return phi3(sizes, position=Rope(theta=1e4, scaling=PHI_3_5_MINI), window=262144)


def phi4_mini() -> Decoder:
    """3,836,021,760 parameters."""
    sizes = Sizes(layers=32, width=3072, heads=24, kv_heads=8, hidden=8192, vocab=200064, context=131072, tied=True)
    return phi3(sizes, position=Rope(theta=1e4, fraction=0.75, scaling=PHI_4_MINI), window=262144)


_LAYER = "model.layers.{}"
HF = (
    *TABLES,
    *PRE_NORMS,
    Row(QKV, f"{_LAYER}.self_attn.qkv_proj.weight", "(h k) d -> d h k", split=0),
    Row("layers/attn/o", f"{_LAYER}.self_attn.o_proj.weight", "d (h k) -> h k d"),
    Row(("layers/mlp/gate", "layers/mlp/up"), f"{_LAYER}.mlp.gate_up_proj.weight", "f d -> d f", split=0),
    Row("layers/mlp/down", f"{_LAYER}.mlp.down_proj.weight", "d f -> f d"),
)
"""Parameters as Phi3ForCausalLM saves them"""


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Phi3Config of this decoder; None if there is none."""
    common = common_config(decoder, "Phi3ForCausalLM", "phi3", head_dim=False)
    if common is None:
        return None
    config = {
        **common.config,
        **_rope_to_config(common.rope, decoder.context),
        "sliding_window": common.mixers[0].window,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    return exact(config, from_config, decoder)


def _rope_to_config(rope: Rope, context: int) -> dict[str, Any]:
    """transformers 4 accepts exactly three fields in `rope_scaling` and computes the others. Where they are not what it
    computes, all fields are written, so that 4 refuses the file. transformers 5 reads both forms."""
    versions, scaling = both_versions(rope), rope.scaling
    if not isinstance(scaling, LongRope):
        return versions
    computed = scaling.factor == context / scaling.original_context and scaling.attention_factor is None
    three = {"type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    return {
        **versions,
        "rope_scaling": three if computed else versions["rope_parameters"],
        "original_max_position_embeddings": scaling.original_context,
    }


DEFAULTS = Sizes(layers=32, width=3072, heads=32, hidden=8192, vocab=32064, context=4096, eps=1e-5)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Phi3Config -> decoder. Absent fields have the defaults of Phi3Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = divided(sizes_from(fields, DEFAULTS))
    rope = rope_from_config(fields, context=sizes.context, original=ORIGINAL)
    if not (rope.scaling is None or isinstance(rope.scaling, LongRope)):
        raise UserError("config.json: rope_type: Phi3Config supports only default and longrope")
    for key in ("full_attn_mod", "interpolate_factor"):  # in the file of Phi-4-mini
        fields.expect(key, 1)
    window = fields.nullable("sliding_window", int, None)
    return finished(fields, phi3(sizes, position=rope, window=window))


FAMILY = Family(
    name="Phi-3",
    model_type="phi3",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"phi3/mini-4k": phi3_mini_4k, "phi3.5/mini": phi3_5_mini, "phi4/mini": phi4_mini},
)
