"""GPT-2, and LaMini-GPT in its shapes. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.arrange import layers_of, repeated
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, Names, exact, finished
from slmjax.models.families.common.gpt_like import gpt_block, parts
from slmjax.models.families.common.rows import QKV, QKV_BIAS, Family, Row, dense_rows, norm_rows, table
from slmjax.nn.mlp import gelu_tanh
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Learned


def gpt2(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50257,
    context: int = 1024,
    hidden: int | None = None,
    tied: bool = True,
    eps: float = 1e-5,
    activation: Callable = gelu_tanh,
    scale: float | None = None,
    by_layer: bool = False,
) -> Decoder:
    """Pre-norm LayerNorm, multi-head attention, learned positions, a GELU MLP (4 * width), biases everywhere.

    Args:
        scale: factor on the scores; None: 1 / sqrt(width of a head).
        by_layer: whether the scores of layer i, from 0, are also divided by i + 1 (the GPT-2 of Mistral, Stanford CRFM
            2021). Each layer is then a block of its own, which takes longer to compile.
    """
    norm = LayerNorm(eps=eps)
    shape: dict[str, Any] = {"width": width, "heads": heads, "hidden": hidden, "norm": norm, "activation": activation}
    block = gpt_block(**shape, scale=scale)
    fields: dict[str, Any] = {"vocab": vocab, "width": width, "context": context, "tied": tied, "position": Learned()}
    if not by_layer:
        return repeated(block, layers, **fields)
    whole = (width // heads) ** -0.5 if scale is None else scale
    divided = (gpt_block(**shape, scale=whole / (i + 1)) for i in range(1, layers))
    return Decoder(**layers_of([block, *divided]), final_norm=norm, **fields)


def gpt2_small() -> Decoder:
    """124,439,808 parameters."""
    return gpt2(layers=12, width=768, heads=12)


def gpt2_medium() -> Decoder:
    """354,823,168 parameters."""
    return gpt2(layers=24, width=1024, heads=16)


def gpt2_large() -> Decoder:
    """774,030,080 parameters."""
    return gpt2(layers=36, width=1280, heads=20)


def gpt2_xl() -> Decoder:
    """1,557,611,200 parameters."""
    return gpt2(layers=48, width=1600, heads=25)


def lamini_gpt_124m() -> Decoder:
    """124,440,576 parameters. Wu et al. 2023, arXiv:2304.14402: GPT-2 small, with a row for [PAD] (`LAMINI_VOCAB`)."""
    return gpt2(layers=12, width=768, heads=12, vocab=LAMINI_VOCAB)


def lamini_gpt_774m() -> Decoder:
    """774,031,360 parameters. GPT-2 large, with a row for [PAD]."""
    return gpt2(layers=36, width=1280, heads=20, vocab=LAMINI_VOCAB)


def lamini_gpt_1_5b() -> Decoder:
    """1,557,612,800 parameters. GPT-2 XL, with a row for [PAD]."""
    return gpt2(layers=48, width=1600, heads=25, vocab=LAMINI_VOCAB)


LAMINI_VOCAB = 50258
"""`vocab_size` in the config.json of LaMini-GPT-124M: the 50,257 tokens of GPT-2, and the [PAD] of its
added_tokens.json, which 774M has too. 1.5B is assumed to have the same, since all were trained alike."""

_LAYER = "transformer.h.{}"
HF = (
    Row("embed/table", "transformer.wte.weight", "v d -> v d"),
    Row("embed/positions", "transformer.wpe.weight", "c d -> c d"),
    *norm_rows("layers/attn_norm", f"{_LAYER}.ln_1"),
    Row(QKV, f"{_LAYER}.attn.c_attn.weight", "d (h k) -> d h k", split=1),
    Row(QKV_BIAS, f"{_LAYER}.attn.c_attn.bias", "(h k) -> h k", split=0),
    *dense_rows("layers/attn/o", f"{_LAYER}.attn.c_proj", "(h k) e -> h k e"),
    *norm_rows("layers/mlp_norm", f"{_LAYER}.ln_2"),
    *dense_rows("layers/mlp/up", f"{_LAYER}.mlp.c_fc", "d e -> d e"),
    *dense_rows("layers/mlp/down", f"{_LAYER}.mlp.c_proj", "d e -> d e"),
    *norm_rows("final_norm", "transformer.ln_f"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as GPT2LMHeadModel saves them: Conv1D weights are [in, out], and c_attn is q, k and v concatenated"""


NAMES = Names(
    layers="n_layer",
    width="n_embd",
    heads="n_head",
    hidden="n_inner",
    context="n_positions",
    activation="activation_function",
)


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The GPT2Config of this decoder, or None if there is none."""
    first = parts(decoder)
    if first is None or decoder.position is None:
        return None
    config = {
        **NAMES.written(decoder, "GPT2LMHeadModel", "gpt2", first.mixer.heads, first.mlp),
        "n_ctx": decoder.context,
        "layer_norm_epsilon": first.norm.eps,
        "scale_attn_weights": first.mixer.scale is None,
        "scale_attn_by_inverse_layer_idx": len(set(decoder.blocks())) > 1,
        "tie_word_embeddings": decoder.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "use_cache": True,
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """GPT2Config -> decoder. Absent fields have the defaults of GPT2Config.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    fields.expect("add_cross_attention", False)
    common = NAMES.read(
        fields, layers=12, width=768, heads=12, hidden=None, vocab=50257, context=1024, activation="gelu_new"
    )
    decoder = gpt2(
        **common,
        tied=fields.take("tie_word_embeddings", bool, True),
        eps=fields.take("layer_norm_epsilon", NUMBER, 1e-5),
        scale=None if fields.take("scale_attn_weights", bool, True) else 1.0,
        by_layer=fields.take("scale_attn_by_inverse_layer_idx", bool, False),
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "gpt2/small": gpt2_small,
        "gpt2/medium": gpt2_medium,
        "gpt2/large": gpt2_large,
        "gpt2/xl": gpt2_xl,
        "lamini-gpt/124m": lamini_gpt_124m,
        "lamini-gpt/774m": lamini_gpt_774m,
        "lamini-gpt/1.5b": lamini_gpt_1_5b,
    },
)
