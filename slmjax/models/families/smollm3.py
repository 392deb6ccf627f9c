"""SmolLM3 (Bakouch et al. 2025): Llama without positions in every fourth layer. Yang et al. 2025, arXiv:2501.18795."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import (
    LLAMA,
    Sizes,
    common_config,
    layer_windows,
    sizes_from,
    whole_rope,
    window_in_use,
    windows_to_config,
)
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import NoPosition, Rope


def smollm3(
    sizes: Sizes,
    *,
    position: Rope,
    rotary: Sequence[bool],
    windows: Sequence[int | None] = (None,),
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Decoder:
    """`rotary`: for each layer, whether it has positions. `windows`: one for each layer, or a single one for all."""
    norm = RMSNorm(eps=sizes.eps)
    biases: dict[str, Any] = {"qkv_bias": attention_bias, "o_bias": attention_bias, "mlp_bias": mlp_bias}
    blocks = [
        sizes.block(position if turns else NoPosition(), norm, window=window, **biases)
        for turns, window in zip(rotary, sizes.each(windows), strict=True)
    ]
    return sizes.decoder(blocks)


def every(interval: int, layers: int) -> list[bool]:
    """For each layer, whether it has positions; every `interval`-th has none."""
    return [bool((i + 1) % interval) for i in range(layers)]


def smollm3_3b() -> Decoder:
    """3,075,098,624 parameters."""
    sizes = Sizes(
        layers=36, width=2048, heads=16, kv_heads=4, hidden=11008, vocab=128256, context=65536, tied=True, eps=1e-6
    )
    return smollm3(sizes, position=Rope(theta=5e6), rotary=every(4, 36))


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The SmolLM3Config of this decoder; None if there is none."""
    common = common_config(decoder, "SmolLM3ForCausalLM", "smollm3")
    if common is None:
        return None
    config = {
        **common.config,
        **both_versions(common.rope),
        "no_rope_layers": [int(isinstance(mixer.position, Rope)) for mixer in common.mixers],
        **windows_to_config(common.mixers),
        "attention_bias": common.mixers[0].qkv_bias,
        "mlp_bias": common.mlp.bias,
    }
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(
    layers=36, width=2048, heads=16, kv_heads=4, hidden=11008, vocab=128256, context=32768, tied=True, eps=1e-6
)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """SmolLM3Config -> decoder. Absent fields have the defaults of SmolLM3Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    rotary = _rotary_from(fields, sizes.layers)
    fields.ignore("max_window_layers", "pretraining_tp")
    decoder = smollm3(
        sizes,
        position=whole_rope(fields, sizes.context, theta=2e6),
        rotary=rotary,
        windows=_windows_from(fields, rotary),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    return finished(fields, decoder)


def _rotary_from(fields: Fields, layers: int) -> list[bool]:
    """`no_rope_layers`, which despite its name holds 1 for layers with positions."""
    interval = fields.take("no_rope_layer_interval", int, 4)
    given = fields.take("no_rope_layers", (list, tuple), None)
    if given is None:
        return every(interval, layers)
    if len(given) < layers or any(x not in (0, 1) for x in given):
        raise UserError(f"config.json: no_rope_layers = {given!s:.60} is not a 0 or 1 for each of {layers} layers")
    return [bool(x) for x in given[:layers]]


def _windows_from(fields: Fields, rotary: Sequence[bool]) -> tuple[int | None, ...]:
    """By `layer_types`, or, if windows are used at all, in the layers without positions."""
    length = window_in_use(fields, None)
    return layer_windows(fields, length, [length is not None and not turns for turns in rotary])


FAMILY = Family(
    name="SmolLM3",
    model_type="smollm3",
    rows=table(LLAMA),
    to_config=to_config,
    from_config=from_config,
    sizes={"smollm3/3b": smollm3_3b},
)
