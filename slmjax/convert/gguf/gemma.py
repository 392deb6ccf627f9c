"""The fields of Gemma 2 and 3 in GGUF files: windows in some layers, soft caps, rotary positions of two kinds."""

from __future__ import annotations

from typing import Any

from slmjax.convert.gguf.fields import (
    RMS,
    SIZES,
    WINDOW,
    Config,
    Field,
    Keys,
    expect,
    head_dim,
    length_of,
    only,
)
from slmjax.convert.gguf.rope import rope_of, rotary
from slmjax.convert.gguf.windows import FULL, PATTERN, kinds_of, period
from slmjax.errors import UserError


def _query_scalar(config: Config, largest: int) -> int:
    """What llama.cpp divides scores by the root of: the width of a head, but in the largest model, which it knows by
    its number of layers, width / heads."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return head_dim(config)


def _gemma(largest: int) -> tuple[Field, ...]:
    """What Gemma 2 and 3 have in common. `largest`: layers of the model with 27B parameters."""

    def write(config: Config) -> dict[str, Any]:
        expect(config, "query_pre_attn_scalar", _query_scalar(config, largest))
        return {}

    return (
        *SIZES,
        RMS,
        only("hidden_activation", "gelu_pytorch_tanh"),
        only("attention_bias", False),
        only("use_bidirectional_attention", False, None),
        only("tie_word_embeddings", True),
        Field(write=write, read=lambda keys, c: {"query_pre_attn_scalar": _query_scalar(c, largest)}),
    )


def _gemma2_windows(config: Config) -> dict[str, Any]:
    if period(config["layer_types"], 2) != 2:
        raise UserError("layer_types: llama.cpp computes this architecture only with full attention in every 2nd layer")
    return {WINDOW: config["sliding_window"]}


def _gemma3_windows(keys: Keys, config: Config) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window, kinds = keys.take(WINDOW, 0), kinds_of(keys, layers, 6)
    if window == 0:  # none in any layer
        return {"sliding_window": None, "layer_types": [FULL] * layers}
    return {"sliding_window": length_of(keys, window), "layer_types": kinds}


def _cap(name: str, usual: float) -> Field:
    """A soft cap, which llama.cpp always applies in Gemma 2."""

    def write(config: Config) -> dict[str, Any]:
        if config[name] is None:
            raise UserError(f"{name} = None: llama.cpp always caps in this architecture")
        return {name: float(config[name])}

    return Field(write=write, read=lambda keys, c: {name: keys.real(name, usual)})


GEMMA2 = (
    *_gemma(46),
    Field(
        write=_gemma2_windows,
        read=lambda keys, c: {
            "sliding_window": keys.count(WINDOW, 4096),
            "layer_types": kinds_of(keys, c["num_hidden_layers"], 2),
        },
    ),
    rotary(),
    _cap("attn_logit_softcapping", 50.0),
    _cap("final_logit_softcapping", 30.0),
)
PLAIN = rotary()


def _two_ropes(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    expect(rope["sliding_attention"], "rope_type", "default")
    local = {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
    return {**PLAIN.write({**config, "rope_parameters": rope["full_attention"]}), **local}


def _read_two_ropes(keys: Keys, config: Config) -> dict[str, Any]:
    """Where a file does not say the base of the layers with a window, it is the one that llama.cpp takes."""
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 1e4)}
    everywhere = PLAIN.read(keys, config)["rope_parameters"]
    return {"rope_parameters": {"sliding_attention": local, "full_attention": everywhere}}


GEMMA3 = (
    *_gemma(62),
    only("attn_logit_softcapping", None),
    only("final_logit_softcapping", None),
    Field(
        write=lambda c: {WINDOW: c["sliding_window"], PATTERN: period(c["layer_types"], 6)},
        read=_gemma3_windows,
    ),
    Field(write=_two_ropes, read=_read_two_ropes),
)
