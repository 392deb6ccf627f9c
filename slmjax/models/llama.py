"""Llama, and the small models of its shape. Touvron et al. 2023, arXiv:2302.13971.

Sizes: SmolLM2 (Allal et al. 2025, arXiv:2502.02737), TinyLlama (Zhang et al. 2024, arXiv:2401.02385),
Llama 3.2 (Meta 2024).
"""

from __future__ import annotations

from slmjax.models.decoder import Block, Decoder
from slmjax.nn.attention import Attention
from slmjax.nn.mlp import SwiGLU
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Llama3Scaling, Rope


def llama(
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    vocab: int,
    context: int = 2048,
    tied: bool = True,
    theta: float = 1e4,
    scaling: Llama3Scaling | None = None,
    head_dim: int | None = None,
    eps: float = 1e-5,
    qkvo_bias: bool = False,
    mlp_bias: bool = False,
) -> Decoder:
    """Pre-norm RMSNorm, grouped-query attention, rotary positions, SwiGLU, no biases."""
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        qkv_bias=qkvo_bias,
        o_bias=qkvo_bias,
        position=Rope(theta=theta, scaling=scaling),
    )
    norm = RMSNorm(eps=eps)
    block = Block(mixer=mixer, mlp=SwiGLU(hidden=hidden, bias=mlp_bias), norm=norm)
    return Decoder(
        vocab=vocab, width=width, pattern=(block,), repeats=layers, context=context, tied=tied, final_norm=norm
    )
