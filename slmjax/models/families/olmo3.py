"""OLMo 3: OLMo 2 with a window in three of four layers; positions are stretched only in the layers without.

Olmo team 2025, arXiv:2512.13961.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families import olmo2
from slmjax.models.families.common.config_fields import NUMBER, Fields, exact, finished
from slmjax.models.families.common.llama_like import (
    Sizes,
    common_config,
    layer_type_names,
    layer_windows,
    sizes_from,
    whole_rope,
)
from slmjax.models.families.common.rope_fields import both_versions, rope_to_config, ropes_by_kind
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import Yarn

THETA = 5e5
"""The base of Olmo3Config in transformers 5"""


def olmo3(sizes: Sizes, *, windows: Sequence[int | None], position: Rope, attention_bias: bool = False) -> Decoder:
    """`windows`: one for each layer. Layers without one have the positions `position`; layers with one the same without
    its scaling."""
    local = replace(position, scaling=None)
    ropes = [position if window is None else local for window in windows]
    blocks = [
        olmo2.olmo2_block(sizes, rope, attention_bias=attention_bias, window=window)
        for rope, window in zip(ropes, windows, strict=True)
    ]
    return sizes.decoder(blocks)


def olmo3_7b() -> Decoder:
    """7,298,011,136 parameters."""
    return _published(Sizes(layers=32, width=4096, heads=32, hidden=11008, vocab=100278, context=65536, eps=1e-6))


def olmo3_32b() -> Decoder:
    """32,233,522,176 parameters."""
    sizes = Sizes(
        layers=64, width=5120, heads=40, kv_heads=8, hidden=27648, vocab=100278, context=65536, eps=1e-6
    )  # fmt: skip
    return _published(sizes)


def _published(sizes: Sizes) -> Decoder:
    scaling = Yarn(factor=8.0, original_context=8192, attention_factor=1.2079441541679836)
    return olmo3(sizes, windows=_fourth(4096, sizes.layers), position=Rope(theta=THETA, scaling=scaling))


def _fourth(window: int, layers: int) -> list[int | None]:
    """No window in every fourth layer."""
    return [window if (i + 1) % 4 else None for i in range(layers)]


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Olmo3Config of this decoder; None if there is none."""
    common = common_config(decoder, "Olmo3ForCausalLM", "olmo3")
    if common is None:
        return None
    ropes = {mixer.window: mixer.position for mixer in common.mixers}
    everywhere = ropes.get(None, common.rope)
    if not isinstance(everywhere, Rope):
        return None
    config = {
        **common.config,
        **both_versions(everywhere),
        "rope_parameters": {
            "sliding_attention": rope_to_config(replace(everywhere, scaling=None)),
            "full_attention": rope_to_config(everywhere),
        },
        "attention_bias": common.mixers[0].qkv_bias,
        "sliding_window": next((window for window in ropes if window is not None), None),
        "layer_types": layer_type_names(common.mixers),
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Olmo3Config -> decoder. Absent fields have the defaults of Olmo3Config of transformers 5.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, olmo2.DEFAULTS)
    slides = [window is not None for window in _fourth(1, sizes.layers)]
    decoder = olmo3(
        sizes,
        windows=layer_windows(fields, fields.nullable("sliding_window", int, 4096), slides),
        position=_position_from(fields, sizes.context),
        attention_bias=fields.take("attention_bias", bool, False),
    )
    return finished(fields, decoder)


def _position_from(fields: Fields, context: int) -> Rope:
    """The positions of layers without a window. `rope_theta` and `rope_scaling` beside `rope_parameters` (the words of
    transformers 4) are about these in transformers 5; layers with a window then have its default base."""
    local, everywhere = ropes_by_kind(fields)
    everywhere["rope_theta"] = fields.take("rope_theta", NUMBER, None)
    everywhere["rope_scaling"] = scaling = fields.take("rope_scaling", Mapping, None)
    if "type" in (scaling or {}) and "rope_type" not in scaling:
        raise UserError("config.json: rope_scaling.type is not read by transformers 5 for OLMo 3; name it rope_type")
    windowed = whole_rope(Fields(local), context, theta=THETA)
    position = whole_rope(Fields(everywhere), context, theta=THETA)
    if windowed.scaling is not None:
        raise UserError(
            "config.json: rope_parameters.sliding_attention has a rope_type other than 'default', which is not "
            "supported; OLMo 3 stretches positions only in full_attention"
        )
    if windowed.theta != position.theta:
        raise UserError(
            f"config.json: rope_theta = {position.theta:g} is that of full_attention alone, and transformers 5 takes "
            f"{windowed.theta:g} for sliding_attention (transformers 4: the same for both); give both the same "
            "rope_theta in rope_parameters"
        )
    return position


FAMILY = Family(
    name="OLMo 3",
    model_type="olmo3",
    rows=table(olmo2.HF),
    to_config=to_config,
    from_config=from_config,
    sizes={"olmo3/7b": olmo3_7b, "olmo3/32b": olmo3_32b},
)
