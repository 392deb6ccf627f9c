"""StarCoder2: Llama's attention with LayerNorm, biases and a plain GELU MLP. Lozhkov et al. 2024, arXiv:2402.19173."""

from collections.abc import Mapping
from typing import Any

from slmjax.models.arrange import repeated
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, Names, exact, finished
from slmjax.models.families.common.gpt_like import parts
from slmjax.models.families.common.llama_like import ATTENTION, PRE_NORMS, TABLES, whole_rope
from slmjax.models.families.common.rope_fields import both_versions
from slmjax.models.families.common.rows import Family, dense_rows, table
from slmjax.nn.attention import Attention
from slmjax.nn.mlp import MLP, gelu_tanh
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Rope


def starcoder2(*, layers, width, heads, kv_heads, hidden, position, vocab=49152, context=4096, tied=True, window=None,
               bias=True, eps=1e-5, activation=gelu_tanh) -> Decoder:  # fmt: skip
    """Pre-norm LayerNorm, grouped-query attention in a window, rotary positions, a GELU MLP, biases."""
    norm = LayerNorm(eps=eps)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=width // heads, qkv_bias=bias, o_bias=bias,
                      position=position, window=window)  # fmt: skip
    block = Block(mixer=mixer, mlp=MLP(hidden=hidden, activation=activation, bias=bias), norm=norm)
    return repeated(block, layers, vocab=vocab, width=width, context=context, tied=tied)


def starcoder2_3b() -> Decoder:
    """3,030,371,328 parameters."""
    return starcoder2(layers=30, width=3072, heads=24, kv_heads=2, hidden=12288, context=16384, window=4096,
                      position=Rope(theta=999999.4420358813))  # fmt: skip


HF = (
    *TABLES, *PRE_NORMS, *ATTENTION,  # named as Llama's
    *dense_rows("layers/mlp/up", "model.layers.{}.mlp.c_fc"),
    *dense_rows("layers/mlp/down", "model.layers.{}.mlp.c_proj"),
)  # fmt: skip
NAMES = Names()  # the usual ones


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Starcoder2Config of this decoder, or None if it cannot say all of it."""
    first = parts(decoder)
    if first is None or not isinstance(first.mixer.position, Rope):
        return None
    config = {
        **NAMES.written(decoder, "Starcoder2ForCausalLM", "starcoder2", first.mixer.heads, first.mlp),
        "num_key_value_heads": first.mixer.kv_heads,
        "norm_epsilon": first.norm.eps,
        "sliding_window": first.mixer.window,
        "use_bias": first.mlp.bias,
        "tie_word_embeddings": decoder.tied,
        **both_versions(first.mixer.position),
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Starcoder2Config -> decoder. Absent fields have the defaults of that class; unknown ones are refused by name."""
    fields = Fields(config)
    for key in ("residual_dropout", "embedding_dropout"):
        fields.take(key, NUMBER, 0.0)  # of training alone
    common = NAMES.read(fields, layers=30, width=3072, heads=24, hidden=12288, vocab=49152, context=4096,
                        activation="gelu_pytorch_tanh")  # fmt: skip
    decoder = starcoder2(
        **common,
        kv_heads=fields.take("num_key_value_heads", int, 2),
        tied=fields.take("tie_word_embeddings", bool, True),
        position=whole_rope(fields, common["context"]),
        window=fields.take("sliding_window", int, None),
        bias=fields.take("use_bias", bool, True),
        eps=fields.take("norm_epsilon", NUMBER, 1e-5),
    )
    return finished(fields, decoder)


FAMILY = Family(name="StarCoder2", model_type="starcoder2", rows=table(HF), to_config=to_config,
                from_config=from_config, sizes={"starcoder2/3b": starcoder2_3b})  # fmt: skip
