"""The families of models that are read from and written for `transformers`, one file each; `common/` is shared code."""

from slmjax.models.families import (
    apple,
    bert,
    bloom,
    cerebras_gpt,
    distilbert,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    lfm2,
    llama,
    mistral,
    mobilebert,
    olmo2,
    olmo3,
    open_lm,
    openelm,
    opt,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)

FAMILIES = (
    llama.FAMILY,
    gpt2.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    granite.MINICPM,
    lfm2.FAMILY,
    gpt_neox.FAMILY,
    bloom.FAMILY,
    opt.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    stablelm.FAMILY,
    openelm.FAMILY,
    open_lm.FAMILY,
    apple.FAMILY,
    bert.FAMILY,
    distilbert.FAMILY,
    mobilebert.FAMILY,
)
"""Export takes the first whose `to_config` accepts the decoder; import the one with the `model_type` of the file"""

SIZES = {
    **{name: size for family in FAMILIES for name, size in family.sizes.items()},
    **cerebras_gpt.SIZES,
}
"""Published sizes by name: functions that return a model"""
