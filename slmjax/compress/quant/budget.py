"""How much of a training run to spend in quantization-aware training."""

from __future__ import annotations

import math


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
