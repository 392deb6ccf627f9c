"""The shape of Apple's on-device model of 2025: two blocks of layers; the second has no key and value projections.

Apple 2025, "Apple Intelligence Foundation Language Models: Tech Report 2025", arXiv:2507.13575, section 2.1. Neither
weights nor a class are public: a decoder of this kind can be trained but not exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from slmjax.errors import UserError
from slmjax.models.decoder import Block, Decoder, Stage
from slmjax.models.families.common.rows import Family
from slmjax.nn.attention import Attention, QKNorm, SharedAttention
from slmjax.nn.mlp import SwiGLU
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope

SHARED = "block 1"
"""The name of the keys and values that the second block reads"""


def two_blocks(
    *,
    first: int,
    second: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    vocab: int,
    context: int,
    theta: float = 5e5,
) -> Decoder:
    """`first` layers like Llama's with normed queries and keys, then `second` layers with only a query projection: they
    attend to the keys and values of the last of the `first` layers. Tied tables, no biases."""
    norm = RMSNorm(eps=1e-5)
    attention = Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=Rope(theta=theta), qk_norm=QKNorm(norm=norm)
    )
    reader = SharedAttention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=attention.position,
        qk_norm=attention.qk_norm,
        source=SHARED,
    )
    block = Block(mixer=attention, mlp=SwiGLU(hidden=hidden), norm=norm)
    last = replace(block, mixer=replace(attention, shares=SHARED))
    stages = (
        *((Stage(pattern=(block,), repeats=first - 1),) if first > 1 else ()),
        Stage(pattern=(last,)),
        Stage(pattern=(replace(block, mixer=reader),), repeats=second),
    )
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=stages[0].pattern,
        repeats=stages[0].repeats,
        tail=stages[1:],
        context=context,
        tied=True,
        final_norm=norm,
    )


def on_device_3b() -> Decoder:
    """2,831,310,720 parameters. A model of this kind, not Apple's: most of its sizes are not public.

    Public (2025 report): about 3B parameters; 62.5% of the layers in block 1 and 37.5% in block 2; block 2 has no key
    and value projections and reads those of the last layer of block 1; a vocabulary of about 150,000.
    Public of the model of 2024 (arXiv:2407.21075, table 1), and assumed unchanged: width 3072, 24 heads of 128
    channels, 8 of keys, RMSNorm, norms of queries and keys, SwiGLU, RoPE with θ = 500,000, tied tables.
    Assumed: 24 layers (26 in 2024, which 5 : 3 does not divide), hidden width 8192, a vocabulary of 153,600, a context
    of 4096, one norm a head of queries and keys.
    """
    return two_blocks(
        first=15, second=9, width=3072, heads=24, kv_heads=8, head_dim=128, hidden=8192, vocab=153600, context=4096
    )


def refusal(decoder: Decoder) -> str | None:
    """Why a decoder whose layers share keys and values is not exported."""
    if not any(isinstance(block.mixer, SharedAttention) for block in decoder.blocks()):
        return None
    return (
        "layers read the keys and values of an earlier layer (SharedAttention): no public class computes that, so "
        "there is nothing to export to; use Attention in every layer to export"
    )


def _no_config(config: Mapping[str, Any]) -> NoReturn:
    raise UserError("config.json: nobody has published a configuration of this model")


FAMILY = Family(
    name="Apple on-device",
    model_type="",
    rows=lambda decoder: (),
    to_config=lambda decoder: None,
    from_config=_no_config,
    sizes={"apple/on-device-3b": on_device_3b},
    refusal=refusal,
)
