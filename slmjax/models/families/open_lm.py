"""OpenLM, of which DCLM is the best known: Llama with LayerNorm, and queries and keys normed over all heads together.

Li et al. 2024 (DataComp-LM), arXiv:2406.11794; the norm: Dehghani et al. 2023, arXiv:2302.05442. Its class is remote
code, which is never run: weights can be imported but not exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.errors import UserError
from slmjax.models.arrange import repeated
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields
from slmjax.models.families.common.rows import QKV, Family, Row, norm_rows, out_rows, table
from slmjax.nn.attention import Attention, QKNorm
from slmjax.nn.mlp import SwiGLU
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.parts import Norm
from slmjax.nn.position import Rope

GAIN_ONLY = LayerNorm(eps=1e-5, bias=False)


def open_lm(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50432,
    context: int = 2048,
    tied: bool = False,
    norm: Norm = GAIN_ONLY,
    qk_norm: bool = True,
    embed_norm: bool = False,
) -> Decoder:
    """Pre-norm, RoPE, SwiGLU (8/3 * width, rounded up to a multiple of 256), the same norm everywhere."""
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        position=Rope(theta=1e4),
        qk_norm=QKNorm(norm=norm, whole=True) if qk_norm else None,
    )
    mlp = SwiGLU(hidden=256 * -(-int(8 * width / 3) // 256))
    block = Block(mixer=mixer, mlp=mlp, norm=norm)
    embed = norm if embed_norm else None
    return repeated(block, layers, vocab=vocab, width=width, context=context, tied=tied, embed_norm=embed)


def dclm_1b() -> Decoder:
    """1,439,893,504 parameters."""
    return open_lm(layers=24, width=2048, heads=16)


def dclm_7b() -> Decoder:
    """6,889,672,704 parameters."""
    return open_lm(layers=32, width=4096, heads=32)


_ATTENTION, _MLP = "model.layers.{}.attention", "model.layers.{}.feed_forward"
HF = (
    Row("embed/table", "model.tok_embeddings.weight", "v d -> v d"),
    *norm_rows("embed/norm", "model.post_embed_norm"),
    *norm_rows("layers/attn_norm", "model.layers.{}.attention_norm"),
    Row(QKV, f"{_ATTENTION}.in_proj.weight", "(h k) d -> d h k", split=0),
    *norm_rows("layers/attn/q_norm", f"{_ATTENTION}.q_norm", "(h k) -> h k"),
    *norm_rows("layers/attn/k_norm", f"{_ATTENTION}.k_norm", "(h k) -> h k"),
    *out_rows(f"{_ATTENTION}.out_proj"),
    *norm_rows("layers/mlp_norm", "model.layers.{}.ffn_norm"),
    Row(("layers/mlp/gate", "layers/mlp/up"), f"{_MLP}.w12.weight", "f d -> d f", split=0),
    Row("layers/mlp/down", f"{_MLP}.w3.weight", "d f -> f d"),
    *norm_rows("final_norm", "model.norm"),
    Row("unembed/table", "model.output.weight", "v d -> v d"),
)
"""Parameters as OpenLMForCausalLM saves them: queries, keys and values one after another, and gate before up"""


def norms(eps: float) -> dict[str, Norm]:
    """Norms by their names in open_lm; `lp` concerns only the precision of training."""
    gain, none = LayerNorm(eps=eps, bias=False), LayerNorm(eps=eps, bias=False, gain=False)
    return {
        "default_layer_norm": LayerNorm(eps=eps),
        "lp_layer_norm": LayerNorm(eps=eps),
        "gain_only_layer_norm": gain,
        "gain_only_lp_layer_norm": gain,
        "no_wb_layer_norm": none,
        "rms_norm": RMSNorm(eps=eps),
    }


def from_config(config: Mapping[str, Any]) -> Decoder:
    """OpenLMConfig, whose fields are those of open_lm's `Params` -> decoder. Absent fields have its defaults.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    known = norms(float(fields.take("norm_eps", NUMBER, 1e-5)))
    kind = fields.take("norm_type", str, "default_layer_norm")
    if kind not in known:
        raise UserError(f"config.json: norm_type = {kind!r} is not supported; expected one of {', '.join(known)}")
    decoder = open_lm(
        layers=fields.take("n_layers", int, 8),
        width=fields.take("dim", int, 512),
        heads=fields.take("n_heads", int, 8),
        vocab=fields.take("vocab_size", int),
        context=fields.take("seq_len", int, 2048),
        tied=fields.take("weight_tying", bool, False),
        norm=known[kind],
        qk_norm=fields.take("apply_qk_norm", bool, False),
        embed_norm=fields.take("post_embed_norm", bool, False),
    )
    if fields.take("ffn_type", str, "swiglu") not in ("swiglu", "swiglu_torch"):
        raise UserError(f"config.json: ffn_type = {config['ffn_type']!r} is not supported; only swiglu is")
    fields.expect("positional_embedding_type", "rotary")
    fields.expect("moe_freq", 0)  # without experts, the other fields about experts have no effect
    for key in ("loss_weight", "capacity_factor", "num_experts", "top_k"):
        fields.take(f"moe_{key}", NUMBER, None)
    for key in ("moe_expert_model_parallelism", "moe_weight_parallelism"):
        fields.take(key, bool, None)
    fields.take("attn_name", str, None)  # the kernel used
    fields.take("tie_word_embeddings", bool, None)  # every config has this field, but the class reads weight_tying
    fields.close()
    return decoder


def refusal(decoder: Decoder) -> str | None:
    """Why a decoder with this norm of queries and keys is not exported."""
    norms = [getattr(block.mixer, "qk_norm", None) for block in decoder.blocks()]
    if not any(n is not None and n.whole and isinstance(n.norm, LayerNorm) for n in norms):
        return None
    return (
        "queries and keys pass a LayerNorm over all heads together, as in DCLM: no class of stock transformers "
        "has that (open_lm's own is not part of it)"
    )


FAMILY = Family(
    name="OpenLM (DCLM)",
    model_type="openlm",
    rows=table(HF),
    to_config=lambda decoder: None,
    from_config=from_config,
    sizes={"dclm/1b": dclm_1b, "dclm/7b": dclm_7b},
    refusal=refusal,
)
