"""StarCoder2: Llama's attention with LayerNorm, biases and a plain GELU MLP. Lozhkov et al. 2024, arXiv:2402.19173."""

from collections.abc import Mapping
from typing import Any

from slmjax.models.decoder import Block, Decoder
from slmjax.models.hf_config import Fields, activation_name
from slmjax.models.hf_rope import both_versions
from slmjax.models.llama_like import ATTENTION, PRE_NORMS, TABLES, exact, finished, whole_rope
from slmjax.models.table import Family, Row, present
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
    return Decoder(vocab=vocab, width=width, pattern=(block,), repeats=layers, context=context, tied=tied,
                   final_norm=norm)  # fmt: skip


def starcoder2_3b() -> Decoder:
    """3,030,371,328 parameters."""
    return starcoder2(layers=30, width=3072, heads=24, kv_heads=2, hidden=12288, context=16384, window=4096,
                      position=Rope(theta=999999.4420358813))  # fmt: skip


_MLP = "model.layers.{}.mlp"
HF = (
    *TABLES, *PRE_NORMS, *ATTENTION,  # named as Llama's
    Row("layers/mlp/up", f"{_MLP}.c_fc.weight", "f d -> d f"),
    Row("layers/mlp/up_bias", f"{_MLP}.c_fc.bias", "f -> f"),
    Row("layers/mlp/down", f"{_MLP}.c_proj.weight", "d f -> f d"),
    Row("layers/mlp/down_bias", f"{_MLP}.c_proj.bias", "d -> d"),
)  # fmt: skip


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The Starcoder2Config of this decoder, or None if it cannot say all of it."""
    mixer, mlp, norm = (getattr(decoder.pattern[0], part) for part in ("mixer", "mlp", "norm"))
    known = isinstance(mixer, Attention) and isinstance(mlp, MLP) and isinstance(norm, LayerNorm)
    if not (known and isinstance(mixer.position, Rope) and activation_name(mlp.activation)):
        return None
    config = {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "intermediate_size": mlp.hidden,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": decoder.context,
        "initializer_range": decoder.initial.std,
        "norm_epsilon": norm.eps,
        "sliding_window": mixer.window,
        "use_bias": mlp.bias,
        "tie_word_embeddings": decoder.tied,
        **both_versions(mixer.position),
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """Starcoder2Config -> decoder. Absent fields have the defaults of that class; unknown ones are refused by name."""
    fields = Fields(config)
    context = fields.take("max_position_embeddings", int, 4096)
    for key in ("residual_dropout", "embedding_dropout"):
        fields.take(key, (float, int), 0.0)  # of training alone
    decoder = starcoder2(
        layers=fields.take("num_hidden_layers", int, 30),
        width=fields.take("hidden_size", int, 3072),
        heads=fields.take("num_attention_heads", int, 24),
        kv_heads=fields.take("num_key_value_heads", int, 2),
        hidden=fields.take("intermediate_size", int, 12288),
        vocab=fields.take("vocab_size", int, 49152),
        context=context,
        tied=fields.take("tie_word_embeddings", bool, True),
        position=whole_rope(fields, context),
        window=fields.take("sliding_window", int, None),
        bias=fields.take("use_bias", bool, True),
        eps=fields.take("norm_epsilon", (float, int), 1e-5),
        activation=fields.activation("hidden_act", "gelu_pytorch_tanh"),
    )
    return finished(fields, decoder)


FAMILY = Family(name="StarCoder2", model_type="starcoder2", rows=lambda decoder: present(HF, decoder),
                to_config=to_config, from_config=from_config, sizes={"starcoder2/3b": starcoder2_3b})  # fmt: skip
