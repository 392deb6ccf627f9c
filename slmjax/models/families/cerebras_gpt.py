"""Cerebras-GPT: GPT-2 with the exact GELU, and its muP form. Dey et al. 2023, arXiv:2304.03208.

The published standard models are GPT2LMHeadModel, read and written by `families/gpt2.py`. No class of transformers has
the scalars of the muP form: export folds them into the weights of a plain GPT-2 (`convert/fold.py`).
"""

from __future__ import annotations

from dataclasses import replace

from slmjax.models.decoder import Decoder
from slmjax.models.families.gpt2 import gpt2
from slmjax.nn.embedding import Logits
from slmjax.nn.mlp import gelu
from slmjax.nn.position import Learned


def cerebras_gpt(*, layers: int, width: int, heads: int, vocab: int = 50257, context: int = 2048) -> Decoder:
    """GPT-2 with the GELU of the error function and a context of 2048."""
    return gpt2(layers=layers, width=width, heads=heads, vocab=vocab, context=context, activation=gelu)


def cerebras_gpt_mup(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50257,
    context: int = 2048,
    base_width: int = 256,
    embed_multiplier: float = 10.0,
    output_multiplier: float = 1.0,
) -> Decoder:
    """The muP form's forward pass. Yang et al. 2022, arXiv:2203.03466, table 8; Dey et al. 2023, appendix G.

    - token and position vectors are multiplied by `embed_multiplier`;
    - q·k is scaled by 1/d, not 1/sqrt(d), for heads of width d;
    - logits are multiplied by `output_multiplier` * `base_width` / width.

    Initial values and learning rates by width are the optimizer's part.

    Args:
        base_width: of the model whose hyperparameters are transferred.
    """
    decoder = gpt2(
        layers=layers, width=width, heads=heads, vocab=vocab, context=context, activation=gelu, scale=heads / width
    )
    return replace(
        decoder,
        embed_scale=embed_multiplier,
        position=Learned(scale=embed_multiplier),
        logits=Logits(scale=output_multiplier * base_width / width),
    )


def cerebras_gpt_111m() -> Decoder:
    """111,050,496 parameters."""
    return cerebras_gpt(layers=10, width=768, heads=12)


def cerebras_gpt_256m() -> Decoder:
    """255,977,024 parameters."""
    return cerebras_gpt(layers=14, width=1088, heads=17)


def cerebras_gpt_590m() -> Decoder:
    """590,310,912 parameters."""
    return cerebras_gpt(layers=18, width=1536, heads=12)


def cerebras_gpt_1_3b() -> Decoder:
    """1,315,723,264 parameters."""
    return cerebras_gpt(layers=24, width=2048, heads=16)


SIZES = {
    "cerebras-gpt/111m": cerebras_gpt_111m,
    "cerebras-gpt/256m": cerebras_gpt_256m,
    "cerebras-gpt/590m": cerebras_gpt_590m,
    "cerebras-gpt/1.3b": cerebras_gpt_1_3b,
}
"""Published sizes by name"""
