"""For each family of `transformers`, the architecture of llama.cpp that it is written as. See `arch.py`."""

from __future__ import annotations

import math
from typing import Any

from gguf import MODEL_ARCH

from slmjax.convert.gguf.arch import (
    OFFSET,
    ROTATED,
    TRANSPOSED,
    Config,
    GGUFArchitecture,
    expect,
    head_dim,
    heads_last,
    llama3_factors,
    long_factors,
    no_window,
    rope_of,
    rotary,
    sizes,
)
from slmjax.errors import UserError

RMS = "attention.layer_norm_rms_epsilon"
LAYER = "attention.layer_norm_epsilon"
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _llama(c: Config) -> dict[str, Any]:
    expect(c, "hidden_act", "silu")
    no_window(c)
    return {**sizes(c), RMS: c["rms_norm_eps"], **rotary(c, "llama3")}


def _granite(c: Config) -> dict[str, Any]:
    return {
        **_llama(c),
        "attention.scale": c["attention_multiplier"],
        "embedding_scale": c["embedding_multiplier"],
        "residual_scale": c["residual_multiplier"],
        "logit_scale": c["logits_scaling"],
    }


def _smollm3(c: Config) -> dict[str, Any]:
    expect(c, "attention_bias", False)
    expect(c, "mlp_bias", False)
    expect(c, "no_rope_layers", [int((i + 1) % 4 != 0) for i in range(c["num_hidden_layers"])])
    return _llama(c)


def _qwen(c: Config) -> dict[str, Any]:
    expect(c, "attention_bias", False)
    return _llama(c)


def _olmo2(c: Config) -> dict[str, Any]:
    expect(c, "attention_bias", False)
    return _llama(c)


def _olmo3(c: Config) -> dict[str, Any]:
    """llama.cpp takes the layers of an OLMo 2 with windows for those of OLMo 3: each fourth sees everything, and only
    there positions are stretched."""
    expect(c, "hidden_act", "silu")
    expect(c, "attention_bias", False)
    if _period(c["layer_types"], 4) != 4:
        raise UserError("layer_types: llama.cpp computes this architecture only with full attention in every 4th layer")
    full = rope_of(c)["full_attention"]
    expect(full, "rope_type", "default", "yarn")
    keys = {**sizes(c), RMS: c["rms_norm_eps"], "attention.sliding_window": c["sliding_window"]}
    return {**keys, **rotary({**c, "rope_parameters": full}, "yarn")}


def _gemma(c: Config, most: int) -> dict[str, Any]:
    expect(c, "hidden_activation", "gelu_pytorch_tanh")
    expect(c, "attention_bias", False)
    expect(c, "query_pre_attn_scalar", head_dim(c))
    expect(c, "use_bidirectional_attention", False, None)
    expect(c, "tie_word_embeddings", True)
    return {
        **sizes(c),
        RMS: c["rms_norm_eps"],
        "attention.sliding_window": c["sliding_window"],
        "attention.sliding_window_pattern": _period(c["layer_types"], most),
    }


def _period(kinds: list[str], usual: int) -> int:
    """Every how manieth layer sees everything, the others a window."""
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    period = full[0] + 1 if full else usual
    if full != list(range(period - 1, len(kinds), period)) or (not full and len(kinds) >= usual):
        raise UserError(f"layer_types: full attention in the layers {full}; llama.cpp wants it in every n-th layer")
    return period


def _gemma2(c: Config) -> dict[str, Any]:
    keys = {**_gemma(c, 2), **rotary(c)}
    if keys.pop("attention.sliding_window_pattern") != 2:
        raise UserError("layer_types: llama.cpp computes this architecture only with full attention in every 2nd layer")
    for key, name in (("attn_logit_softcapping", "attn"), ("final_logit_softcapping", "final")):
        if c[key] is None:
            raise UserError(f"{key} = None: llama.cpp always caps in this architecture")
        keys[f"{name}_logit_softcapping"] = float(c[key])
    return keys


def _gemma3(c: Config) -> dict[str, Any]:
    expect(c, "attn_logit_softcapping", None)
    expect(c, "final_logit_softcapping", None)
    rope = rope_of(c)
    expect(rope["sliding_attention"], "rope_type", "default")
    local = {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
    return {**_gemma(c, 6), **rotary({**c, "rope_parameters": rope["full_attention"]}), **local}


def _phi3(c: Config) -> dict[str, Any]:
    expect(c, "hidden_act", "silu")
    no_window(c)
    rope = rope_of(c)
    keys = {**sizes(c), RMS: c["rms_norm_eps"], **rotary(c, "longrope")}
    if rope["rope_type"] != "longrope":
        return keys
    old = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or c["max_position_embeddings"] / old
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    return {**keys, "rope.scaling.original_context_length": old, "rope.scaling.attn_factor": scale}


def _stablelm(c: Config) -> dict[str, Any]:
    expect(c, "hidden_act", "silu")
    parallel = {"use_parallel_residual": c["use_parallel_residual"]}
    return {**sizes(c), LAYER: c["layer_norm_eps"], **parallel, **rotary(c)}


def _gpt_neox(c: Config) -> dict[str, Any]:
    expect(c, "hidden_act", *GELUS)
    expect(c, "attention_bias", True)
    parallel = {"use_parallel_residual": c["use_parallel_residual"]}
    return {**sizes(c), LAYER: c["layer_norm_eps"], **parallel, **rotary(c)}


def _gpt2(c: Config) -> dict[str, Any]:
    expect(c, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    expect(c, "scale_attn_weights", True)
    expect(c, "scale_attn_by_inverse_layer_idx", False)
    return {
        "vocab_size": c["vocab_size"],
        "context_length": c["n_positions"],
        "embedding_length": c["n_embd"],
        "block_count": c["n_layer"],
        "feed_forward_length": c["n_inner"] or 4 * c["n_embd"],
        "attention.head_count": c["n_head"],
        LAYER: c["layer_norm_epsilon"],
    }


def _bloom(c: Config) -> dict[str, Any]:
    expect(c, "apply_residual_connection_post_layernorm", False)
    return {
        "vocab_size": c["vocab_size"],
        "context_length": c.get("seq_length", 2048),  # ALiBi has no maximum length; BLOOM was trained with 2048
        "embedding_length": c["hidden_size"],
        "block_count": c["n_layer"],
        "feed_forward_length": 4 * c["hidden_size"],
        "attention.head_count": c["n_head"],
        "attention.head_count_kv": c["n_head"],
        LAYER: c["layer_norm_epsilon"],
    }


LLAMA = GGUFArchitecture(
    model_type="llama", arch=MODEL_ARCH.LLAMA, metadata=_llama, transforms=ROTATED, extra=llama3_factors
)
ARCHITECTURES = (
    LLAMA,
    GGUFArchitecture(
        model_type="mistral", arch=MODEL_ARCH.LLAMA, metadata=_llama, transforms=ROTATED, extra=llama3_factors
    ),
    GGUFArchitecture(
        model_type="granite", arch=MODEL_ARCH.GRANITE, metadata=_granite, transforms=ROTATED, extra=llama3_factors
    ),
    GGUFArchitecture(
        model_type="smollm3", arch=MODEL_ARCH.SMOLLM3, metadata=_smollm3, transforms=ROTATED, extra=llama3_factors
    ),
    GGUFArchitecture(model_type="qwen2", arch=MODEL_ARCH.QWEN2, metadata=_qwen),
    GGUFArchitecture(model_type="qwen3", arch=MODEL_ARCH.QWEN3, metadata=_qwen),
    GGUFArchitecture(model_type="olmo2", arch=MODEL_ARCH.OLMO2, metadata=_olmo2),
    GGUFArchitecture(model_type="olmo3", arch=MODEL_ARCH.OLMO2, metadata=_olmo3),
    GGUFArchitecture(model_type="gemma2", arch=MODEL_ARCH.GEMMA2, metadata=_gemma2, transforms=(OFFSET,), drift=2e-3),
    GGUFArchitecture(
        model_type="gemma3_text", arch=MODEL_ARCH.GEMMA3, metadata=_gemma3, transforms=(OFFSET,), drift=2e-3
    ),
    GGUFArchitecture(model_type="phi3", arch=MODEL_ARCH.PHI3, metadata=_phi3, extra=long_factors),
    GGUFArchitecture(
        model_type="stablelm",
        arch=MODEL_ARCH.STABLELM,
        metadata=_stablelm,
        stacked=r"\.[qk]_layernorm\.norms\.\d+\.weight$",
    ),
    GGUFArchitecture(model_type="gpt2", arch=MODEL_ARCH.GPT2, metadata=_gpt2, transforms=(TRANSPOSED,), drift=2e-3),
    GGUFArchitecture(
        model_type="gpt_neox",
        arch=MODEL_ARCH.GPTNEOX,
        metadata=_gpt_neox,
        transforms=(heads_last(r"\.query_key_value\.", lambda c: c["num_attention_heads"]),),
        drift=2e-3,  # llama.cpp also uses the tanh approximation for the exact GELU
    ),
    GGUFArchitecture(
        model_type="bloom",
        arch=MODEL_ARCH.BLOOM,
        metadata=_bloom,
        transforms=(heads_last(r"\.query_key_value\.", lambda c: c["n_head"]),),
        drift=2e-3,
    ),
)


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
