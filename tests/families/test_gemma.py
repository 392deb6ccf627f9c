"""Gemma 2 and Gemma 3 (text) over the space of their configurations."""

from dataclasses import replace

import pytest
from families.llama_shaped import ROPES, all_seen, common, mixer, proved_each
from families.proof import moves, prove_any
from hypothesis import strategies as st

from slmjax.nn.attention import QKNorm
from slmjax.nn.block import PostBranch
from slmjax.nn.embedding import Logits
from slmjax.nn.mlp import gelu
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope

# GemmaConfig refuses a width that the heads do not divide.
SHAPES = (
    {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 24},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 32},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 32},
)


def gemma(draw, model_type, ropes):
    config = common(draw, model_type, layers=(2, 3), shapes=SHAPES, ropes=ropes, activation="hidden_activation")
    kinds = ["full_attention", "sliding_attention", "sliding_attention"][: config["num_hidden_layers"]]
    return {
        **config,
        "attention_bias": draw(st.booleans()),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0])),
        "query_pre_attn_scalar": draw(st.sampled_from([6, 10, 24])),
        "sliding_window": draw(st.sampled_from([5, 23, 100])),
        **draw(st.sampled_from([{}, {"layer_types": kinds}])),
    }


@st.composite
def gemma2s(draw):
    return {**gemma(draw, "gemma2", ROPES), "attn_logit_softcapping": draw(st.sampled_from([None, 2.0]))}


@st.composite
def gemma3s(draw):
    ropes = (
        {"rope_theta": 1e4, "rope_local_base_freq": 1e2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e2},
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
            }
        },
        {},
    )
    interval = draw(st.sampled_from([{}, {"sliding_window_pattern": 2}]))
    config = gemma(draw, "gemma3_text", ropes)
    return config if "layer_types" in config else {**config, **interval}


@pytest.mark.parametrize("configs", [gemma2s(), gemma3s()], ids=["gemma2", "gemma3"])
def test_any_configuration(reference, configs):
    prove_any(reference, configs)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "tie_word_embeddings": False,  # tied, the largest logit would be that of the token itself, again and again
}
CONFIGS = {
    "gemma2": {"num_hidden_layers": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0},
    "gemma3_text": {"num_hidden_layers": 8},  # five with a window, one without, two with one
}


def only_after(block):
    """Branches read the residual stream as it is."""
    return PostBranch(mixer=block.mixer, mlp=block.mlp, norm=block.norm)


def plain_gain(block):
    return replace(block, norm=replace(block.norm, offset=0.0))


BLOCKS = {
    "gain from 0": plain_gain,
    "no norm before": only_after,
    "scale of the head": mixer(scale=None),
    "no window": mixer(window=None),
    "another window": mixer(window=8),
    "eps": lambda block: replace(block, norm=replace(block.norm, eps=0.05)),
    "exact gelu": lambda block: replace(block, mlp=replace(block.mlp, activation=gelu)),
}
WRONG = {
    "gemma2": {**BLOCKS, "no bound": mixer(softcap=None)},
    "gemma3_text": {
        **BLOCKS,
        "no qk norm": mixer(qk_norm=None),
        "one theta": mixer(position=Rope(theta=1e6)),
        "plain gain of queries and keys": mixer(qk_norm=QKNorm(norm=RMSNorm(eps=1e-6))),
    },
}


proved = proved_each(SIZES, CONFIGS)


def test_each_switch_moves_the_logits(proved):
    name, imported = proved
    right = imported.decoder
    all_seen(imported, WRONG[name])
    assert moves(right, replace(right, embed_scale=1.0), imported.params)
    assert moves(right, replace(right, logits=Logits(softcap=5.0)), imported.params)


def test_a_pattern_of_layers_is_one_scan(proved):
    name, imported = proved
    stages = [(len(stage.pattern), stage.repeats) for stage in imported.decoder.stages]
    assert stages == {"gemma2": [(2, 2)], "gemma3_text": [(1, 5), (3, 1)]}[name]
