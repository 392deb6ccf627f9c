"""The number of a model's parameters, and the training FLOPs a token.

A multiply-add is 2 FLOPs, and the backward pass costs twice the forward: 6 per parameter and token. Four conventions
are in use for what to count, and scaling exponents depend on the choice (Porian et al. 2024, arXiv:2406.19146). Of
parameters that only some tokens use (experts), the share that a token uses is counted: N is the number of active
parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn

from slmjax.models.assembly import Assembly
from slmjax.tree import count, flatten

TABLES = ("embed/table", "embed/positions", "embed/types", "unembed/table", "head/rest")


class Flops(NamedTuple):
    """Training FLOPs a token. Name the convention wherever a figure is reported."""

    nonembedding: int
    """(i) 6 * N_nonembedding. Kaplan et al. 2020"""
    head: int
    """(ii) 6 * (N_nonembedding + V * d): the product with the unembedding is counted, the lookup is not. If only a
    share of the tokens has logits (masked tokens), the head is counted for this share"""
    attention: int
    """(iii) (ii) + 6 * T * d * L: with causal attention over sequences of length T; less if attention has a window,
    twice the attention in an encoder"""
    total: int
    """(iv) 6 * N: every parameter, a tied table once. Hoffmann et al. 2022"""


def parameter_count(decoder: Assembly) -> int:
    """N: all parameters, a tied table once."""
    return count(_abstract(decoder))


def active_count(decoder: Assembly) -> int:
    """Active parameters: the sum over all parameters of the share that a token uses (`FeedForward.active`)."""
    shares = [(f"{place.path}/", place.block) for place in decoder.places()]
    total = 0.0
    for path, leaf in flatten(_abstract(decoder)).items():
        inside = [block.active(path.removeprefix(start)) for start, block in shares if path.startswith(start)]
        total += count(leaf) * (inside[0] if inside else 1.0)
    return round(total)


def nonembedding_count(decoder: Assembly) -> int:
    """N without the tables (`TABLES`)."""
    return sum(_nonembedding(decoder).values())


def flops_per_token(decoder: Assembly, length: int, predicted: float = 1.0) -> Flops:
    """Training FLOPs a token in sequences of `length` tokens, under the four conventions.

    Args:
        predicted: the share of tokens whose logits are computed (`ObjectiveSpec.predicted`), for (ii) and (iii).
    """
    idle = parameter_count(decoder) - active_count(decoder)
    inside = 6 * (nonembedding_count(decoder) - idle)
    of_head = sum(n for path, n in _nonembedding(decoder).items() if path.startswith("head/"))
    head = inside - 6 * of_head + round(6 * (of_head + decoder.logit_products()) * predicted)
    # Scores and weighted values: 2 * 2 * H * K a key forward, three times that with backward.
    scores = sum(block.mixer.attended_width * block.mixer.attended_keys(length) for block in decoder.blocks())
    return Flops(
        nonembedding=inside,
        head=head,
        attention=head + round(12 * scores),
        total=6 * (parameter_count(decoder) - idle),
    )


def _nonembedding(decoder: Assembly) -> dict[str, int]:
    return {path: count(leaf) for path, leaf in flatten(_abstract(decoder)).items() if path not in TABLES}


def _abstract(decoder: Assembly) -> Any:
    return nn.meta.unbox(decoder.declared())
