"""Llama, and small models of the same architecture. Touvron et al. 2023, arXiv:2302.13971.

Sizes: SmolLM2 (Allal et al. 2025, arXiv:2502.02737), TinyLlama (Zhang et al. 2024, arXiv:2401.02385), Llama 3.1 and 3.2
(Meta 2024, arXiv:2407.21783), MobileLLaMA (Chu et al. 2023, arXiv:2312.16886), MobileLLM (Liu et al. 2024,
arXiv:2402.14905).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import Fields, exact, finished
from slmjax.models.families.common.llama_like import LLAMA, Sizes, common_config, sizes_from, whole_rope
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, table
from slmjax.nn.mlp import silu
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import Llama3Scaling, RopeScaling


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
    scaling: RopeScaling | None = None,
    head_dim: int | None = None,
    eps: float = 1e-5,
    activation: Callable = silu,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Decoder:
    """Pre-norm RMSNorm, grouped-query attention, rotary positions, SwiGLU; no biases by default."""
    sizes = Sizes(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        vocab=vocab,
        context=context,
        tied=tied,
        head_dim=head_dim,
        eps=eps,
        activation=activation,
    )
    return _llama(sizes, Rope(theta=theta, scaling=scaling), attention_bias, mlp_bias)


def _llama(sizes: Sizes, position: Rope, attention_bias: bool, mlp_bias: bool) -> Decoder:
    biases: dict[str, Any] = {"qkv_bias": attention_bias, "o_bias": attention_bias, "mlp_bias": mlp_bias}
    return sizes.decoder([sizes.block(position, RMSNorm(eps=sizes.eps), **biases)] * sizes.layers)


def smollm2_135m() -> Decoder:
    """134,515,008 parameters."""
    return llama(
        layers=30, width=576, heads=9, kv_heads=3, hidden=1536, vocab=49152, context=8192, tied=True, theta=1e5
    )


def smollm2_360m() -> Decoder:
    """361,821,120 parameters."""
    return llama(
        layers=32, width=960, heads=15, kv_heads=5, hidden=2560, vocab=49152, context=8192, tied=True, theta=1e5
    )


def smollm2_1_7b() -> Decoder:
    """1,711,376,384 parameters."""
    return llama(
        layers=24, width=2048, heads=32, kv_heads=32, hidden=8192, vocab=49152, context=8192, tied=True, theta=1.3e5
    )


def tinyllama_1_1b() -> Decoder:
    """1,100,048,384 parameters."""
    return llama(
        layers=22, width=2048, heads=32, kv_heads=4, hidden=5632, vocab=32000, context=2048, tied=False, theta=1e4
    )


def llama_3_2_1b() -> Decoder:
    """1,235,814,400 parameters."""
    return llama(
        layers=16, width=2048, heads=32, kv_heads=8, hidden=8192, vocab=128256, context=131072, tied=True, theta=5e5,
        scaling=Llama3Scaling(factor=32.0),
    )  # fmt: skip


def llama_3_2_3b() -> Decoder:
    """3,212,749,824 parameters."""
    return llama(
        layers=28, width=3072, heads=24, kv_heads=8, hidden=8192, vocab=128256, context=131072, tied=True, theta=5e5,
        scaling=Llama3Scaling(factor=32.0),
    )  # fmt: skip


def llama_3_1_8b() -> Decoder:
    """8,030,261,248 parameters."""
    return llama(
        layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, vocab=128256, context=131072, tied=False, theta=5e5,
        scaling=Llama3Scaling(factor=8.0),
    )  # fmt: skip


def mobilellama_1_4b() -> Decoder:
    """1,364,297,728 parameters."""
    return llama(
        layers=24, width=2048, heads=16, kv_heads=16, hidden=5632, vocab=32000, context=2048, tied=False, eps=1e-6
    )


def mobilellama_2_7b() -> Decoder:
    """2,701,560,320 parameters."""
    return llama(
        layers=32, width=2560, heads=32, kv_heads=32, hidden=6912, vocab=32000, context=2048, tied=False, eps=1e-6
    )


def mobilellm_125m() -> Decoder:
    """124,635,456 parameters."""
    return llama(layers=30, width=576, heads=9, kv_heads=3, hidden=1536, vocab=32000, context=2048, tied=True)


def mobilellm_350m() -> Decoder:
    """345,355,200 parameters."""
    return llama(layers=32, width=960, heads=15, kv_heads=5, hidden=2560, vocab=32000, context=2048, tied=True)


def fox_1_1_6b() -> Decoder:
    """1,665,271,808 parameters. Fox-1, Hu et al. 2024, arXiv:2411.05281; its config.json is a plain Llama's."""
    return llama(
        layers=32, width=2048, heads=16, kv_heads=4, hidden=4096, vocab=256000, context=8192, tied=True, theta=1e4
    )


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The LlamaConfig of this decoder, with the keys of transformers 4 beside those of 5; None if there is none."""
    common = common_config(decoder, "LlamaForCausalLM", "llama")
    # LlamaConfig itself refuses a width that the heads do not divide.
    if common is None or decoder.width % common.mixers[0].heads:
        return None
    config = {
        **common.config,
        **both_versions(common.rope),
        "attention_bias": common.mixers[0].qkv_bias,
        "mlp_bias": common.mlp.bias,
    }
    return exact(config, from_config, decoder)


DEFAULTS = Sizes(layers=32, width=4096, heads=32, hidden=11008, vocab=32000, context=2048, eps=1e-6)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """LlamaConfig -> decoder. Absent fields have the defaults of LlamaConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    sizes = sizes_from(fields, DEFAULTS)
    fields.expect("pretraining_tp", 1)
    decoder = _llama(
        sizes,
        whole_rope(fields, sizes.context),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="Llama",
    model_type="llama",
    rows=table(LLAMA),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "llama/smollm2-135m": smollm2_135m,
        "llama/smollm2-360m": smollm2_360m,
        "llama/smollm2-1.7b": smollm2_1_7b,
        "llama/tinyllama-1.1b": tinyllama_1_1b,
        "llama/llama-3.2-1b": llama_3_2_1b,
        "llama/llama-3.2-3b": llama_3_2_3b,
        "llama/llama-3.1-8b": llama_3_1_8b,
        "llama/mobilellama-1.4b": mobilellama_1_4b,
        "llama/mobilellama-2.7b": mobilellama_2_7b,
        "llama/mobilellm-125m": mobilellm_125m,
        "llama/mobilellm-350m": mobilellm_350m,
        "llama/fox-1-1.6b": fox_1_1_6b,
    },
)
