"""GPT-NeoX: Pythia. Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmjax.models.arrange import repeated
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import NUMBER, Fields, Names, exact, finished
from slmjax.models.families.common.gpt_like import gpt_block, megatron_rows, parts
from slmjax.models.families.common.rope_fields import both_versions, rope_from_config, rope_to_config
from slmjax.models.families.common.rows import Family, Row, norm_rows, table
from slmjax.nn.block import AnyBlock, Parallel
from slmjax.nn.mlp import gelu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Rope


def gpt_neox(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int = 50304,
    context: int = 2048,
    hidden: int | None = None,
    tied: bool = False,
    position: Rope = Rope(fraction=0.25),  # noqa: B008
    eps: float = 1e-5,
    activation: Callable = gelu,
    attention_bias: bool = True,
    wiring: type[AnyBlock] = Parallel,
) -> Decoder:
    """LayerNorm, rotary positions on a quarter of each head, attention and MLP in parallel, each with its own norm."""
    block = gpt_block(
        width=width,
        heads=heads,
        hidden=hidden,
        norm=LayerNorm(eps=eps),
        activation=activation,
        kind=wiring,
        position=position,
        attention_bias=attention_bias,
    )
    return repeated(block, layers, vocab=vocab, width=width, context=context, tied=tied)


def pythia_14m() -> Decoder:
    """14,067,712 parameters."""
    return gpt_neox(layers=6, width=128, heads=4)


def pythia_31m() -> Decoder:
    """30,494,720 parameters."""
    return gpt_neox(layers=6, width=256, heads=8)


def pythia_70m() -> Decoder:
    """70,426,624 parameters."""
    return gpt_neox(layers=6, width=512, heads=8)


def pythia_160m() -> Decoder:
    """162,322,944 parameters."""
    return gpt_neox(layers=12, width=768, heads=12)


def pythia_410m() -> Decoder:
    """405,334,016 parameters."""
    return gpt_neox(layers=24, width=1024, heads=16)


def pythia_1b() -> Decoder:
    """1,011,781,632 parameters."""
    return gpt_neox(layers=16, width=2048, heads=8)


def pythia_1_4b() -> Decoder:
    """1,414,647,808 parameters."""
    return gpt_neox(layers=24, width=2048, heads=16)


HF = (
    Row("embed/table", "gpt_neox.embed_in.weight", "v d -> v d"),
    *megatron_rows("gpt_neox.layers.{}", "attention"),
    *norm_rows("final_norm", "gpt_neox.final_layer_norm"),
    Row("unembed/table", "embed_out.weight", "v d -> v d", alias="lm_head.weight"),
)
"""Parameters as GPTNeoXForCausalLM saves them. The output table is `lm_head` in the live model of transformers 5,
`embed_out` in its files and in those of 4."""


NAMES = Names()


def to_config(decoder: Decoder) -> dict[str, Any] | None:
    """The GPTNeoXConfig of this decoder, with the keys of transformers 4 beside those of 5; None if there is none."""
    first = parts(decoder)
    if first is None or not isinstance(first.mixer.position, Rope):
        return None
    position = first.mixer.position
    config = {
        **NAMES.written(decoder, "GPTNeoXForCausalLM", "gpt_neox", first.mixer.heads, first.mlp),
        "layer_norm_eps": first.norm.eps,
        "tie_word_embeddings": decoder.tied,
        "use_parallel_residual": isinstance(decoder.pattern[0], Parallel),
        "attention_bias": first.mixer.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": position.fraction,
        "rotary_emb_base": position.theta,
        **({} if position.scaling is None else {"rope_scaling": both_versions(position)["rope_scaling"]}),
        # the default of the class is 0.25, not 1
        "rope_parameters": {**rope_to_config(position), "partial_rotary_factor": position.fraction},
        "use_cache": True,
    }
    return exact(config, from_config, decoder)


def from_config(config: Mapping[str, Any]) -> Decoder:
    """GPTNeoXConfig -> decoder. Absent fields have the defaults of GPTNeoXConfig.

    Raises:
        UserError: a field is not supported; the message names it.
    """
    fields = Fields(config)
    common = NAMES.read(
        fields, layers=44, width=6144, heads=64, hidden=24576, vocab=50432, context=2048, activation="gelu"
    )
    decoder = gpt_neox(
        **common,
        tied=fields.take("tie_word_embeddings", bool, False),
        position=rope_from_config(
            fields,
            fraction=0.25,
            fraction_keys=("partial_rotary_factor", "rotary_pct"),
            theta_keys=("rope_theta", "rotary_emb_base"),
            context=common["context"],
        ),
        eps=fields.take("layer_norm_eps", NUMBER, 1e-5),
        attention_bias=fields.take("attention_bias", bool, True),
        wiring=Parallel if fields.take("use_parallel_residual", bool, True) else Block,
    )
    return finished(fields, decoder)


FAMILY = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    rows=table(HF),
    to_config=to_config,
    from_config=from_config,
    sizes={
        "pythia/14m": pythia_14m,
        "pythia/31m": pythia_31m,
        "pythia/70m": pythia_70m,
        "pythia/160m": pythia_160m,
        "pythia/410m": pythia_410m,
        "pythia/1b": pythia_1b,
        "pythia/1.4b": pythia_1_4b,
    },
)
