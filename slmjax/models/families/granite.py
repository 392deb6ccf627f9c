"""Granite, and MiniCPM, which computes the same function: Llama with four scalars as in muP.

Token vectors, scores, branches and logits each have a factor. Granite 3.0 (IBM 2024); MiniCPM (Hu et al. 2024,
arXiv:2404.06395, section 3, "Tensor Program"); Yang et al. 2022, arXiv:2203.03466.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slmjax.errors import UserError
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families import llama
from slmjax.models.families.common.config_fields import NUMBER, Fields, exact
from slmjax.models.families.common.rows import Family
from slmjax.nn.attention import Attention
from slmjax.nn.embedding import Logits

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def scaled(plain: Decoder, *, embed: float, scores: float | None, branch: float, logits: float) -> Decoder:
    """A Llama with four factors: on token vectors, on q·k (None: head_dim^-1/2), on branches, on logits."""
    blocks = []
    for block in plain.pattern:
        assert isinstance(block.mixer, Attention)
        neutral = scores == block.mixer.head_dim**-0.5
        mixer = replace(block.mixer, scale=None if neutral else scores)
        blocks.append(replace(block, mixer=mixer, branch_scale=branch))
    return replace(plain, pattern=tuple(blocks), embed_scale=embed, logits=Logits(scale=logits))


def granite_3_1_2b() -> Decoder:
    """2,533,531,648 parameters."""
    plain = llama.llama(
        layers=40, width=2048, heads=32, kv_heads=8, hidden=8192, vocab=49155, context=131072, tied=True, theta=5e6
    )
    return scaled(plain, embed=12.0, scores=1 / 64, branch=0.22, logits=1 / 8)


def granite_3_1_8b() -> Decoder:
    """8,170,848,256 parameters."""
    plain = llama.llama(
        layers=40, width=4096, heads=32, kv_heads=8, hidden=12800, vocab=49155, context=131072, tied=True, theta=1e7
    )
    return scaled(plain, embed=12.0, scores=1 / 128, branch=0.22, logits=1 / 16)


def minicpm(*, layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, context: int) -> Decoder:
    """A MiniCPM as published: embedding × 12, branches × 1.4/√L, logits ÷ (width / 256)."""
    plain = llama.llama(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden, vocab=vocab, context=context
    )
    return scaled(plain, embed=12.0, scores=None, branch=1.4 / math.sqrt(layers), logits=1 / (width / 256))


def minicpm_1b() -> Decoder:
    """1,360,246,272 parameters. 1,247,442,432 of them are not in the embedding table, as in table 2 of the paper."""
    return minicpm(layers=52, width=1536, heads=24, kv_heads=8, hidden=3840, vocab=73440, context=4096)


def minicpm_2b() -> Decoder:
    """2,724,880,896 parameters. 2,442,057,984 of them are not in the embedding table, as in table 2 of the paper."""
    return minicpm(layers=40, width=2304, heads=36, kv_heads=36, hidden=5760, vocab=122753, context=4096)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The GraniteConfig of this decoder: the LlamaConfig of the decoder without its four factors, and the factors. None
    if there is none."""
    block = decoder.pattern[0]
    if not (isinstance(block, Block) and isinstance(block.mixer, Attention)):
        return None
    mixer = block.mixer
    plain = replace(block, mixer=replace(mixer, scale=None), branch_scale=1.0)
    base = llama.to_config(replace(decoder, pattern=(plain,), embed_scale=1.0, logits=Logits()))
    if base is None or len(decoder.pattern) > 1:
        return None
    config = {
        **base,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": decoder.embed_scale,
        "attention_multiplier": mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale,
        "residual_multiplier": block.branch_scale,
        "logits_scaling": _inverse(decoder.logits.scale),
    }
    return exact(config, from_config, decoder)


def _inverse(x: float) -> float:
    """A y with 1/y == x exactly, which 1/x rounded need not be."""
    y = 1 / x
    near = (round(y, 9), y, math.nextafter(y, 0), math.nextafter(y, math.inf))
    return next((z for z in near if z and 1 / z == x), y)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """GraniteConfig -> decoder. Absent fields have the defaults of GraniteConfig, which are those of LlamaConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields({key: config.get(key) for key in MULTIPLIERS})
    embed, scores, branch, logits = (float(fields.take(key, NUMBER, 1.0)) for key in MULTIPLIERS)
    _not_zero("logits_scaling", logits)
    plain = llama.from_config({key: value for key, value in config.items() if key not in MULTIPLIERS})
    return scaled(plain, embed=embed, scores=scores, branch=branch, logits=1 / logits)


def from_minicpm_config(config: Mapping[str, Any]) -> Decoder:
    """MiniCPMConfig of MiniCPM 1 and 2 -> decoder. Absent fields have the defaults of that class.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    own = ("scale_emb", "scale_depth", "dim_model_base", "rope_scaling")
    fields = Fields({key: config.get(key) for key in own})
    embed, depth, base = (float(fields.take(key, NUMBER, 1.0)) for key in own[:3])
    fields.expect("rope_scaling", None)
    _not_zero("dim_model_base", base)
    tied = config.get("tie_word_embeddings")
    rest = {key: value for key, value in config.items() if key not in own}
    plain = llama.from_config({**rest, "tie_word_embeddings": True if tied is None else tied})
    branch = depth / math.sqrt(plain.layers)
    return scaled(plain, embed=embed, scores=None, branch=branch, logits=1 / (plain.width / base))


def _not_zero(key: str, value: float) -> None:
    if value == 0.0:
        raise UserError(f"config.json: {key} = 0 divides by zero; expected another number")


FAMILY = Family(
    name="Granite",
    model_type="granite",
    rows=llama.FAMILY.rows,
    to_config=to_config,
    from_config=from_config,
    sizes={"granite/3.1-2b": granite_3_1_2b, "granite/3.1-8b": granite_3_1_8b},
)

MINICPM = Family(
    name="MiniCPM",
    model_type="minicpm",
    rows=llama.FAMILY.rows,
    to_config=lambda decoder: None,  # its class is remote code; Granite, which computes the same, is exported instead
    from_config=from_minicpm_config,
    sizes={"minicpm/1b": minicpm_1b, "minicpm/2b": minicpm_2b},
)
