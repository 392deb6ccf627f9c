"""OPT, and Galactica in its class. Zhang et al. 2022, arXiv:2205.01068; Taylor et al. 2022, arXiv:2211.09085."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.arrange import repeated
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import Fields, Names, exact, finished
from slmjax.models.families.common.gpt_like import gpt_block, parts
from slmjax.models.families.common.rows import Family, Row, attention_rows, dense_rows, norm_rows, table
from slmjax.nn.block import AnyBlock, PostNorm
from slmjax.nn.mlp import gelu, relu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Learned


def opt(
    *,
    layers: int,
    width: int,
    heads: int,
    hidden: int | None = None,
    vocab: int = 50272,
    context: int = 2048,
    table_width: int | None = None,
    tied: bool = True,
    activation: Callable = relu,
    bias: bool = True,
    affine: bool = True,
    wiring: type[AnyBlock] = Block,
    final_norm: bool = True,
) -> Decoder:
    """Pre-norm LayerNorm, multi-head attention, learned positions from row 2 on, a ReLU MLP, biases everywhere.

    Args:
        table_width: width of the embedding tables if it is not `width` (350m).
        affine: whether norms have a gain and a bias.
        wiring: `PostNorm` for 350m, which has no final norm.
    """
    norm = LayerNorm(eps=1e-5, gain=affine, bias=affine)  # OPTConfig has no field for it
    block = gpt_block(
        width=width,
        heads=heads,
        hidden=hidden,
        norm=norm,
        activation=activation,
        kind=wiring,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return repeated(
        block,
        layers,
        vocab=vocab,
        width=width,
        context=context,
        tied=tied,
        final_norm=norm if final_norm else None,
        position=Learned(offset=2),
        table_width=None if table_width == width else table_width,
    )


def opt_125m() -> Decoder:
    """125,239,296 parameters."""
    return opt(layers=12, width=768, heads=12)


def opt_350m() -> Decoder:
    """331,196,416 parameters."""
    return opt(layers=24, width=1024, heads=16, table_width=512, wiring=PostNorm, final_norm=False)


def opt_1_3b() -> Decoder:
    """1,315,758,080 parameters."""
    return opt(layers=24, width=2048, heads=32)


def galactica_125m() -> Decoder:
    """125,030,400 parameters."""
    return opt(layers=12, width=768, heads=12, vocab=50000, activation=gelu)


def galactica_1_3b() -> Decoder:
    """1,315,201,024 parameters."""
    return opt(layers=24, width=2048, heads=32, vocab=50000, activation=gelu)


_DECODER, _LAYER = "model.decoder", "model.decoder.layers.{}"
HF = (
    Row("embed/table", f"{_DECODER}.embed_tokens.weight", "v d -> v d"),
    Row("embed/positions", f"{_DECODER}.embed_positions.weight", "c d -> c d"),
    Row("embed/project", f"{_DECODER}.project_in.weight", "d p -> p d"),
    *norm_rows("layers/attn_norm", f"{_LAYER}.self_attn_layer_norm"),
    *attention_rows(f"{_LAYER}.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *norm_rows("layers/mlp_norm", f"{_LAYER}.final_layer_norm"),
    *dense_rows("layers/mlp/up", f"{_LAYER}.fc1"),
    *dense_rows("layers/mlp/down", f"{_LAYER}.fc2"),
    *norm_rows("final_norm", f"{_DECODER}.final_layer_norm"),
    Row("project_out/weight", f"{_DECODER}.project_out.weight", "p d -> d p"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
)
"""Parameters as OPTForCausalLM saves them; a layer's `final_layer_norm` is the norm of its MLP"""


NAMES = Names(hidden="ffn_dim", activation="activation_function", std="init_std")


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The OPTConfig of this decoder, or None if there is none."""
    first = parts(decoder)
    if first is None:
        return None
    before = isinstance(decoder.pattern[0], Block)
    config = {
        **NAMES.written(decoder, "OPTForCausalLM", "opt", first.mixer.heads, first.mlp),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and decoder.final_norm is None,
        "word_embed_proj_dim": decoder.table_width or decoder.width,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "enable_bias": first.mlp.bias,
        "layer_norm_elementwise_affine": first.norm.gain,
        "tie_word_embeddings": decoder.tied,
        "use_cache": True,
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """OPTConfig -> decoder. Absent fields have the defaults of OPTConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    # `Fields` ignores keys that begin with an underscore; this one changes the model.
    fields = Fields({**config, "remove_final_layer_norm": config.get("_remove_final_layer_norm")})
    before = fields.take("do_layer_norm_before", bool, True)
    removed = fields.take("remove_final_layer_norm", bool, False)
    # Galactica's files have two more fields, with values that mean the same as OPT.
    fields.expect("learned_embeddings", True)
    fields.expect("scale_embeddings", False)
    common = NAMES.read(
        fields, layers=12, width=768, heads=12, hidden=3072, vocab=50272, context=2048, activation="relu"
    )
    decoder = opt(
        **common,
        table_width=fields.take("word_embed_proj_dim", int, None),
        tied=fields.take("tie_word_embeddings", bool, True),
        bias=fields.take("enable_bias", bool, True),
        affine=fields.take("layer_norm_elementwise_affine", bool, True),
        wiring=Block if before else PostNorm,
        final_norm=before and not removed,
    )
    return finished(fields, decoder, NAMES.std)


FAMILY = Family(
    name="OPT",
    model_type="opt",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "opt/125m": opt_125m,
        "opt/350m": opt_350m,
        "opt/1.3b": opt_1_3b,
        "galactica/125m": galactica_125m,
        "galactica/1.3b": galactica_1_3b,
    },
)
