"""How much of a training run to spend in quantization-aware training."""

from __future__ import annotations

import math

APPLIES = 100.0
"""Tokens for each byte of the quantized model from which on the law was fitted"""


def fraction(tokens: float, params: float, bits: float) -> float:
    """The share of tokens in quantization-aware training with the lowest final loss: exp(-6.7297 / ln S), with
    S = tokens / (params * bits / 8), the tokens for each byte of the quantized model. It grows with S; 0 for S <= 1.

    Args:
        tokens: of the whole run.
        params: parameters of the model.
        bits: of a weight, such as 2, or 1.58.

    References:
        arXiv:2509.22935, where it was fitted for models of 86M to 759M parameters and S of 100 and more
    """
    per_byte = tokens / (params * bits / 8)
    return math.exp(-6.7297 / math.log(per_byte)) if per_byte > 1 else 0.0


def share(tokens: float, params: float, bits: float, otherwise: float = 0.25) -> float:
    """The share of the steps for `Quantize(share=...)`: that of the law where it was fitted, from 100 tokens for each
    byte on (where it gives 0.23 and more), and `otherwise` for shorter runs, for which the law gives next to nothing:
    0.09 at 16 tokens a byte, 0 at one.

    Args:
        tokens, params, bits: as in `fraction`.
        otherwise: for runs that are too short for the law.
    """
    return fraction(tokens, params, bits) if tokens / (params * bits / 8) >= APPLIES else otherwise
