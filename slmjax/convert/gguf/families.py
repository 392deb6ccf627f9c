"""For each family of `transformers`, the architecture of llama.cpp that it is written as and read from (`arch.py`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gguf import MODEL_ARCH

from slmjax.convert.gguf.arch import OFFSET, ROTATED, TRANSPOSED, GGUFArchitecture, heads_last
from slmjax.convert.gguf.fields import (
    HIDDEN,
    NO_WINDOW,
    RMS,
    SIZES,
    TIED,
    WINDOW,
    Config,
    Field,
    Keys,
    count,
    expect,
    flag,
    head_dim,
    if_there,
    length_of,
    multi_head,
    no_window,
    only,
    real,
    shortest,
    sizes,
)
from slmjax.convert.gguf.file import shown
from slmjax.convert.gguf.gemma import GEMMA2, GEMMA3
from slmjax.convert.gguf.rope import LLAMA3, LONGROPE, YARN, rope_of, rotary
from slmjax.convert.gguf.windows import OLMO3
from slmjax.errors import UserError

LAYER = "attention.layer_norm_epsilon"
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")

LIKE_LLAMA = (*SIZES, RMS, only("hidden_act", "silu"), TIED, NO_WINDOW)
BIASES = (if_there("attention_bias", "blk.0.attn_q.bias"), if_there("mlp_bias", "blk.0.ffn_up.bias"))
LLAMA_FIELDS = (*LIKE_LLAMA, *BIASES, rotary(LLAMA3, YARN))
QWEN = (*LIKE_LLAMA, only("attention_bias", False), rotary(YARN))


def _score_scale(keys: Keys, config: Config) -> dict[str, Any]:
    usual = head_dim(config) ** -0.5
    found = keys.real("attention.scale", usual)
    return {"attention_multiplier": usual if found == shortest(usual) else found}


def _turns(keys: Keys, config: Config) -> dict[str, Any]:
    if not keys.flag("rope.scaling.finetuned", True):
        raise UserError(f"{keys.prefix}rope.scaling.finetuned = False: a Granite without positions is not supported")
    return {}


GRANITE = (
    *LLAMA_FIELDS,
    Field(write=lambda c: {"attention.scale": c["attention_multiplier"]}, read=_score_scale),
    real("embedding_scale", "embedding_multiplier", 1.0),
    real("residual_scale", "residual_multiplier", 1.0),
    real("logit_scale", "logits_scaling"),
    Field(read=_turns),
)


def _turned(config: Config) -> list[int]:
    """Which layers of SmolLM3 have rotary positions: not each fourth."""
    return [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def _write_turned(config: Config) -> dict[str, Any]:
    expect(config, "no_rope_layers", _turned(config))
    return {}


SMOLLM3 = (
    *LIKE_LLAMA,
    only("attention_bias", False),
    only("mlp_bias", False),
    rotary(LLAMA3),
    Field(write=_write_turned, read=lambda keys, c: {"no_rope_layers": _turned(c)}),
)


def _phi3_window(config: Config) -> dict[str, Any]:
    no_window(config)
    return {} if config.get("sliding_window") is None else {WINDOW: config["sliding_window"]}


def _read_phi3_window(keys: Keys, config: Config) -> dict[str, Any]:
    """llama.cpp has no windows in this architecture, but files say the window of the model: it is kept."""
    window = keys.take(WINDOW, 0)
    return {"sliding_window": None if window == 0 else length_of(keys, window)}


def _original(keys: Keys, config: Config) -> dict[str, Any]:
    """transformers reads this field at the top level of a Phi3Config."""
    name = "original_max_position_embeddings"
    return {name: rope_of(config)[name]} if name in rope_of(config) else {}


PHI3 = (
    *SIZES,
    RMS,
    only("hidden_act", "silu"),
    TIED,
    Field(write=_phi3_window, read=_read_phi3_window),
    rotary(LONGROPE),
    Field(read=_original),
)


def _read_side_by_side(keys: Keys, config: Config) -> dict[str, Any]:
    """llama.cpp goes by the tensor, not by the key, which old converters set wrongly."""
    keys.take("use_parallel_residual")
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in keys.file}


STABLELM = (
    *SIZES,
    real(LAYER, "layer_norm_eps"),
    only("hidden_act", "silu"),
    TIED,
    if_there("use_qkv_bias", "blk.0.attn_q.bias"),
    if_there("qk_layernorm", "blk.0.attn_q_norm.weight"),
    Field(write=lambda c: {"use_parallel_residual": c["use_parallel_residual"]}, read=_read_side_by_side),
    rotary(),
)


def _write_gelu(config: Config) -> dict[str, Any]:
    expect(config, "hidden_act", *GELUS)
    return {} if config["hidden_act"] == GELUS[0] else {"hidden_act": config["hidden_act"]}


def _read_gelu(keys: Keys, config: Config) -> dict[str, Any]:
    """llama.cpp computes one GELU for all, and so files do not say which the model has, but for a key of slmjax."""
    found = keys.take("hidden_act", GELUS[0])
    if not isinstance(found, str) or found not in GELUS:
        raise keys.wrong("hidden_act", found, f"one of {', '.join(GELUS)}")
    return {"hidden_act": found}


GPT_NEOX = (
    *sizes(),
    HIDDEN,
    multi_head(),
    real(LAYER, "layer_norm_eps"),
    Field(write=_write_gelu, read=_read_gelu),
    only("attention_bias", True),
    flag("use_parallel_residual", "use_parallel_residual"),
    TIED,
    rotary(),
)
GPT2 = (
    *sizes(layers="n_layer", width="n_embd", context=count("context_length", "n_positions")),
    Field(
        write=lambda c: {"feed_forward_length": c["n_inner"] or 4 * c["n_embd"]},
        read=lambda keys, c: {"n_inner": keys.count("feed_forward_length")},
    ),
    multi_head("n_head", "n_embd"),
    real(LAYER, "layer_norm_epsilon"),
    only("activation_function", "gelu_new", "gelu_pytorch_tanh"),
    only("scale_attn_weights", True),
    only("scale_attn_by_inverse_layer_idx", False),
    TIED,
)


def _read_bloom_hidden(keys: Keys, config: Config) -> dict[str, Any]:
    hidden, expected = keys.count("feed_forward_length"), 4 * config["hidden_size"]
    if hidden != expected:
        raise UserError(f"{keys.prefix}feed_forward_length = {hidden} is not supported; only 4 * width, {expected}, is")
    return {}


BLOOM = (
    *sizes(
        layers="n_layer",
        context=Field(  # ALiBi has no maximum length; BLOOM was trained with 2048
            write=lambda c: {"context_length": c.get("seq_length", 2048)},
            read=lambda keys, c: {"seq_length": keys.count("context_length")},
        ),
    ),
    Field(write=lambda c: {"feed_forward_length": 4 * c["hidden_size"]}, read=_read_bloom_hidden),
    multi_head("n_head"),
    real(LAYER, "layer_norm_epsilon"),
    only("apply_residual_connection_post_layernorm", False),
    TIED,
)


LLAMA = GGUFArchitecture(model_type="llama", arch=MODEL_ARCH.LLAMA, fields=LLAMA_FIELDS, transforms=ROTATED)
ARCHITECTURES = (
    LLAMA,
    GGUFArchitecture(model_type="mistral", arch=MODEL_ARCH.LLAMA, fields=LLAMA_FIELDS, transforms=ROTATED),
    GGUFArchitecture(model_type="granite", arch=MODEL_ARCH.GRANITE, fields=GRANITE, transforms=ROTATED),
    GGUFArchitecture(model_type="smollm3", arch=MODEL_ARCH.SMOLLM3, fields=SMOLLM3, transforms=ROTATED),
    GGUFArchitecture(model_type="qwen2", arch=MODEL_ARCH.QWEN2, fields=QWEN),
    GGUFArchitecture(model_type="qwen3", arch=MODEL_ARCH.QWEN3, fields=QWEN),
    GGUFArchitecture(model_type="olmo3", arch=MODEL_ARCH.OLMO2, fields=OLMO3, told_by=WINDOW),
    GGUFArchitecture(model_type="olmo2", arch=MODEL_ARCH.OLMO2, fields=QWEN),
    GGUFArchitecture(model_type="gemma2", arch=MODEL_ARCH.GEMMA2, fields=GEMMA2, transforms=(OFFSET,), drift=2e-3),
    GGUFArchitecture(model_type="gemma3_text", arch=MODEL_ARCH.GEMMA3, fields=GEMMA3, transforms=(OFFSET,), drift=2e-3),
    GGUFArchitecture(model_type="phi3", arch=MODEL_ARCH.PHI3, fields=PHI3),
    GGUFArchitecture(
        model_type="stablelm",
        arch=MODEL_ARCH.STABLELM,
        fields=STABLELM,
        stacked=r"\.[qk]_layernorm\.norms\.\d+\.weight$",
    ),
    GGUFArchitecture(model_type="gpt2", arch=MODEL_ARCH.GPT2, fields=GPT2, transforms=(TRANSPOSED,), drift=2e-3),
    GGUFArchitecture(
        model_type="gpt_neox",
        arch=MODEL_ARCH.GPTNEOX,
        fields=GPT_NEOX,
        transforms=(heads_last(r"\.query_key_value\.", lambda c: c["num_attention_heads"]),),
        drift=2e-3,  # llama.cpp also uses the tanh approximation for the exact GELU
    ),
    GGUFArchitecture(
        model_type="bloom",
        arch=MODEL_ARCH.BLOOM,
        fields=BLOOM,
        transforms=(heads_last(r"\.query_key_value\.", lambda c: c["n_head"]),),
        drift=2e-3,
    ),
)
"""Of several for an architecture of llama.cpp, a file is read as the first that may have its keys"""


def architecture_of(model_type: str) -> GGUFArchitecture:
    """The architecture that a `model_type` of transformers is written as.

    Raises:
        UserError: llama.cpp has no such architecture, or it is not supported here.
    """
    for one in ARCHITECTURES:
        if one.model_type == model_type:
            return one
    names = ", ".join(one.model_type for one in ARCHITECTURES)
    raise UserError(f"a model of type {model_type!r} cannot be written as GGUF; expected one of {names}")


def architecture_named(name: str | None, keys: Collection[str] = ()) -> GGUFArchitecture:
    """The architecture that a file with this `general.architecture` and these keys is read as.

    Raises:
        UserError: it is not supported.
    """
    for one in ARCHITECTURES:
        if one.name == name and (one.told_by is None or f"{name}.{one.told_by}" in keys):
            return one
    names = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES))
    raise UserError(f"general.architecture = {shown(name)} cannot be imported; expected one of {names}")
