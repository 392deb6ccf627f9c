"""Gemma 3, text: Gemma 2 with norms of queries and keys instead of soft caps, five layers with a window to one without,
and rotary positions of two kinds. Gemma team 2025, arXiv:2503.19786, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families import gemma2
from slmjax.models.families.common.config_fields import NUMBER, Fields, exact, finished
from slmjax.models.families.common.llama_like import Sizes, common_config, layer_windows, whole_rope
from slmjax.models.families.common.rope_fields import both_versions, ropes_by_kind
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.attention import QKNorm
from slmjax.nn.embedding import Logits
from slmjax.nn.mlp import gelu_tanh
from slmjax.nn.position import Rope

LOCAL, GLOBAL = Rope(theta=1e4), Rope(theta=1e6)
"""Positions of the layers with a window, and of those without"""


def gemma3(
    sizes: Sizes,
    *,
    windows: Sequence[int | None],
    local: Rope = LOCAL,
    everywhere: Rope = GLOBAL,
    query_scalar: int = 256,
    logit_cap: float | None = None,
    attention_bias: bool = False,
) -> Decoder:
    """`windows`: one for each layer. Positions are `local` in layers that have one, `everywhere` in the others."""
    qk_norm = QKNorm(norm=gemma2.gemma_norm(sizes))
    ropes = [everywhere if window is None else local for window in windows]
    blocks = [
        gemma2.gemma_block(sizes, rope, window, query_scalar, attention_bias, qk_norm=qk_norm)
        for rope, window in zip(ropes, windows, strict=True)
    ]
    return sizes.decoder(blocks, embed_scale=math.sqrt(sizes.width), logits=Logits(softcap=logit_cap))


def gemma3_270m() -> Decoder:
    """268,098,176 parameters."""
    sizes = Sizes(
        layers=18, width=640, heads=4, kv_heads=1, head_dim=256, hidden=2048, vocab=262144, context=32768, tied=True,
        eps=1e-6, activation=gelu_tanh,
    )  # fmt: skip
    return gemma3(sizes, windows=_sixth(512, 18))


def gemma3_1b() -> Decoder:
    """999,885,952 parameters."""
    sizes = Sizes(
        layers=26, width=1152, heads=4, kv_heads=1, head_dim=256, hidden=6912, vocab=262144, context=32768, tied=True,
        eps=1e-6, activation=gelu_tanh,
    )  # fmt: skip
    return gemma3(sizes, windows=_sixth(512, 26))


def _sixth(window: int, layers: int) -> list[int | None]:
    """No window in every sixth layer."""
    return [window if (i + 1) % 6 else None for i in range(layers)]


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Gemma3TextConfig of this decoder; None if there is none."""
    common = common_config(decoder, "Gemma3ForCausalLM", "gemma3_text", activation="hidden_activation")
    if common is None or decoder.width % common.mixers[0].heads:
        return None
    ropes = {mixer.window is not None: mixer.position for mixer in common.mixers if isinstance(mixer.position, Rope)}
    local, everywhere = ropes.get(True, LOCAL), ropes.get(False, GLOBAL)
    versions = both_versions(everywhere)
    config = {
        **gemma2.gemma_config(common, decoder),
        **versions,
        "rope_local_base_freq": local.theta,
        "rope_parameters": {
            "sliding_attention": both_versions(local)["rope_parameters"],
            "full_attention": versions["rope_parameters"],
        },
        "attn_logit_softcapping": None,
    }
    return exact(config, from_config, decoder)


DEFAULTS = replace(gemma2.DEFAULTS, vocab=262208, context=131072)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Gemma3TextConfig -> decoder. Absent fields have the defaults of Gemma3TextConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = gemma2.gemma_sizes(fields, DEFAULTS)
    fields.expect("attn_logit_softcapping", None)  # transformers reads this field but does not apply it
    local, everywhere = _ropes_from(fields, sizes.context)
    length = fields.nullable("sliding_window", int, 4096)
    interval = fields.take("sliding_window_pattern", int, None)
    slides = [bool((i + 1) % (interval or 6)) for i in range(sizes.layers)]
    windows = layer_windows(fields, length, slides)
    if interval and [window is not None for window in windows] != slides:
        raise UserError(f"config.json: layer_types contradicts sliding_window_pattern = {interval}; remove one")
    decoder = gemma3(
        sizes,
        windows=windows,
        local=local,
        everywhere=everywhere,
        query_scalar=fields.take("query_pre_attn_scalar", int, 256),
        logit_cap=fields.nullable("final_logit_softcapping", NUMBER, None),
        attention_bias=fields.take("attention_bias", bool, False),
    )
    return finished(fields, decoder)


def _ropes_from(fields: Fields, context: int) -> tuple[Rope, Rope]:
    """Local and global positions: nested in `rope_parameters` (transformers 5), or separate fields (4)."""
    local, everywhere = ropes_by_kind(fields)
    local["rope_theta"] = fields.take("rope_local_base_freq", NUMBER, None)
    everywhere["rope_theta"] = fields.take("rope_theta", NUMBER, None)
    everywhere["rope_scaling"] = fields.take("rope_scaling", Mapping, None)
    return (
        whole_rope(Fields(local), context, theta=LOCAL.theta),
        whole_rope(Fields(everywhere), context, theta=GLOBAL.theta),
    )


FAMILY = Family(
    name="Gemma 3",
    model_type="gemma3_text",
    rows=table(gemma2.HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"gemma3/270m": gemma3_270m, "gemma3/1b": gemma3_1b},
)
