"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows in some layers.

Yang et al. 2024, arXiv:2407.10671 and arXiv:2412.15115.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
from slmjax.nn.attention import Attention
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope


def qwen2(sizes: Sizes, *, position: Rope, windows: Sequence[int | None] = (None,)) -> Decoder:
    """`windows`: one for each layer, or a single one for all."""
    norm = RMSNorm(eps=sizes.eps)
    return sizes.decoder([sizes.block(position, norm, qkv_bias=True, window=window) for window in sizes.each(windows)])


def _sized(
    *, layers: int, width: int, heads: int, kv_heads: int, hidden: int, context: int = 32768, tied: bool = True
) -> Decoder:
    sizes = Sizes(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        vocab=151936 if tied else 152064,
        context=context,
        tied=tied,
        eps=1e-6,
    )
    return qwen2(sizes, position=Rope(theta=1e6))


def qwen2_0_5b() -> Decoder:
    """494,032,768 parameters."""
    return _sized(layers=24, width=896, heads=14, kv_heads=2, hidden=4864, context=131072)


def qwen2_1_5b() -> Decoder:
    """1,543,714,304 parameters."""
    return _sized(layers=28, width=1536, heads=12, kv_heads=2, hidden=8960, context=131072)


def qwen2_5_0_5b() -> Decoder:
    """494,032,768 parameters."""
    return _sized(layers=24, width=896, heads=14, kv_heads=2, hidden=4864)


def qwen2_5_1_5b() -> Decoder:
    """1,543,714,304 parameters."""
    return _sized(layers=28, width=1536, heads=12, kv_heads=2, hidden=8960, context=131072)


def qwen2_5_3b() -> Decoder:
    """3,085,938,688 parameters."""
    return _sized(layers=36, width=2048, heads=16, kv_heads=2, hidden=11008)


def qwen2_5_7b() -> Decoder:
    """7,615,616,512 parameters."""
    return _sized(layers=28, width=3584, heads=28, kv_heads=4, hidden=18944, context=131072, tied=False)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Qwen2Config of this decoder; None if there is none."""
    common = common_config(decoder, "Qwen2ForCausalLM", "qwen2")
    if common is None:
        return None
    config = {**common.config, **both_versions(common.rope), **some_windows(common.mixers)}
    return exact(config, from_config, decoder)


def some_windows(mixers: Sequence[Attention]) -> dict[str, Any]:
    """The fields that `windows_from` reads; all windows are assumed to equal the first."""
    windowed = [i for i, mixer in enumerate(mixers) if mixer.window is not None]
    return {**windows_to_config(mixers), "max_window_layers": windowed[0] if windowed else len(mixers)}


def windows_from(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or of those from `max_window_layers` on.

    Raises:
        UserError: some layers have a window but its length is not given.
    """
    length = window_in_use(fields, 4096)
    first = fields.take("max_window_layers", int, 28)
    return layer_windows(fields, length, [length is not None and i >= first for i in range(layers)])


DEFAULTS = Sizes(
    layers=32, width=4096, heads=32, kv_heads=32, hidden=22016, vocab=151936, context=32768, tied=False, eps=1e-6
)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Qwen2Config -> decoder. Absent fields have the defaults of Qwen2Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    windows = windows_from(fields, sizes.layers)
    return finished(fields, qwen2(sizes, position=whole_rope(fields, sizes.context), windows=windows))


FAMILY = Family(
    name="Qwen2",
    model_type="qwen2",
    rows=table(LLAMA),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "qwen2/0.5b": qwen2_0_5b,
        "qwen2/1.5b": qwen2_1_5b,
        "qwen2.5/0.5b": qwen2_5_0_5b,
        "qwen2.5/1.5b": qwen2_5_1_5b,
        "qwen2.5/3b": qwen2_5_3b,
        "qwen2.5/7b": qwen2_5_7b,
    },
)
