"""Windows of attention in GGUF files: which layers have one; and OLMo 3, which stretches positions in the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from slmjax.convert.gguf.fields import RMS, SIZES, TIED, WINDOW, Config, Field, Keys, expect, only
from slmjax.convert.gguf.rope import YARN, rope_of, rotary
from slmjax.errors import UserError

PATTERN = "attention.sliding_window_pattern"
FULL, WINDOWED = KINDS = ("full_attention", "sliding_attention")


def period(kinds: list[str], usual: int) -> int:
    """Every how manieth layer sees everything, the others a window.

    Raises:
        UserError: they do not follow each other regularly.
    """
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    found = full[0] + 1 if full else usual
    if full != list(range(found - 1, len(kinds), found)) or (not full and len(kinds) >= usual):
        raise UserError(f"layer_types: full attention in the layers {full}; llama.cpp wants it in every n-th layer")
    return found


def kinds_of(keys: Keys, layers: int, usual: int) -> list[str]:
    """The kind of attention of each layer: the key is a period, or says for each layer whether it has a window."""
    found = keys.take(PATTERN, usual)
    if isinstance(found, np.ndarray) and found.shape == (layers,):
        return [KINDS[int(bool(x))] for x in found]
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise keys.wrong(PATTERN, found, f"a number of layers, or true or false for each of {layers}")
    return _regular(layers, found)


def _regular(layers: int, every: int) -> list[str]:
    return [KINDS[int((i + 1) % every != 0)] for i in range(layers)]


def _olmo3_windows(config: Config) -> dict[str, Any]:
    if config["layer_types"] != _regular(config["num_hidden_layers"], 4):
        raise UserError("layer_types: llama.cpp computes this architecture only with full attention in every 4th layer")
    return {WINDOW: config["sliding_window"]}


EVERYWHERE = rotary(YARN)


def _stretched_where_full(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    expect(rope["sliding_attention"], "rope_type", "default")
    expect(rope["full_attention"], "rope_type", "default", "yarn")
    expect(rope["sliding_attention"], "rope_theta", rope["full_attention"]["rope_theta"])
    return dict(EVERYWHERE.write({**config, "rope_parameters": rope["full_attention"]}))


def _read_stretched(keys: Keys, config: Config) -> dict[str, Any]:
    full = EVERYWHERE.read(keys, config)["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    return {"rope_parameters": {"sliding_attention": local, "full_attention": full}}


OLMO3 = (
    *SIZES,
    RMS,
    only("hidden_act", "silu"),
    only("attention_bias", False),
    TIED,
    Field(
        write=_olmo3_windows,
        read=lambda keys, c: {
            "sliding_window": keys.count(WINDOW),
            "layer_types": _regular(c["num_hidden_layers"], 4),
        },
    ),
    Field(write=_stretched_where_full, read=_read_stretched),
)
"""llama.cpp takes the layers of an OLMo 2 with windows for those of OLMo 3: each fourth sees everything, and only there
positions are stretched"""
