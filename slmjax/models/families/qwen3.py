"""Qwen3 (dense): Llama with an RMS norm of each query and key, and windows in some layers. arXiv:2505.09388."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import LLAMA, QK_NORMS, Sizes, common_config, sizes_from, whole_rope
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.models.families.qwen2 import some_windows, windows_from
from slmjax.nn.attention import QKNorm
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope


def qwen3(
    sizes: Sizes, *, position: Rope, windows: Sequence[int | None] = (None,), attention_bias: bool = False
) -> Decoder:
    """`windows`: one for each layer, or a single one for all."""
    norm = RMSNorm(eps=sizes.eps)
    mixer = {"qkv_bias": attention_bias, "o_bias": attention_bias, "qk_norm": QKNorm(norm=norm)}
    return sizes.decoder([sizes.block(position, norm, window=window, **mixer) for window in sizes.each(windows)])


def _sized(*, layers: int, width: int, heads: int, hidden: int, tied: bool = True) -> Decoder:
    sizes = Sizes(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        hidden=hidden,
        vocab=151936,
        context=40960,
        tied=tied,
        eps=1e-6,
    )
    return qwen3(sizes, position=Rope(theta=1e6))


def qwen3_0_6b() -> Decoder:
    """596,049,920 parameters."""
    return _sized(layers=28, width=1024, heads=16, hidden=3072)


def qwen3_1_7b() -> Decoder:
    """1,720,574,976 parameters."""
    return _sized(layers=28, width=2048, heads=16, hidden=6144)


def qwen3_4b() -> Decoder:
    """4,022,468,096 parameters."""
    return _sized(layers=36, width=2560, heads=32, hidden=9728)


def qwen3_8b() -> Decoder:
    """8,190,735,360 parameters."""
    return _sized(layers=36, width=4096, heads=32, hidden=12288, tied=False)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Qwen3Config of this decoder; None if there is none."""
    common = common_config(decoder, "Qwen3ForCausalLM", "qwen3")
    if common is None:
        return None
    config = {
        **common.config,
        **both_versions(common.rope),
        **some_windows(common.mixers),
        "attention_bias": common.mixers[0].qkv_bias,
    }
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    hidden=22016,
    vocab=151936,
    context=32768,
    tied=False,
    eps=1e-6,
)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Qwen3Config -> decoder. Absent fields have the defaults of Qwen3Config: heads of 128 channels, too.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    decoder = qwen3(
        sizes,
        position=whole_rope(fields, sizes.context),
        windows=windows_from(fields, sizes.layers),
        attention_bias=fields.take("attention_bias", bool, False),
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="Qwen3",
    model_type="qwen3",
    rows=table((*LLAMA, *QK_NORMS)),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "qwen3/0.6b": qwen3_0_6b,
        "qwen3/1.7b": qwen3_1_7b,
        "qwen3/4b": qwen3_4b,
        "qwen3/8b": qwen3_8b,
    },
)
