"""Phi-3 and StableLM over the space of their configurations."""

from dataclasses import replace

import pytest
from families.llama_shaped import ROPES, all_seen, common, mixer, proved_each
from families.proof import prove_any
from hypothesis import strategies as st

from slmjax.nn.norm import LayerNorm, RMSNorm

# The heads share the width.
SHAPES = (
    {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32},
)


@st.composite
def phi3s(draw):
    """Of 24 tokens: an original context of 10 is exceeded by all that is decoded, one of 40 by nothing."""
    config = common(draw, "phi3", shapes=SHAPES, ropes=({"rope_theta": 1e3},))
    fraction = draw(st.sampled_from([1.0, 0.5]))
    pairs = int(config["hidden_size"] // config["num_attention_heads"] * fraction) // 2
    original = draw(st.sampled_from([10, 40, None]))
    scaling = {
        "short_factor": [1.0 + 0.25 * i for i in range(pairs)],
        "long_factor": [2.0 + 1.5 * i for i in range(pairs)],
    }
    told = draw(
        st.sampled_from(
            [
                {"rope_scaling": {"type": "longrope", **scaling}},
                {"rope_parameters": {"rope_type": "longrope", "factor": 3.0, **scaling}},
                {"rope_parameters": {"rope_type": "longrope", "attention_factor": 1.5, **scaling}},
            ]
        )
    )
    return {
        **config,
        "partial_rotary_factor": fraction,
        "sliding_window": draw(st.sampled_from([None, 7, 262144])),
        **({} if original is None else {"original_max_position_embeddings": original, **told}),
    }


@st.composite
def stablelms(draw):
    config = common(draw, "stablelm", shapes=SHAPES, ropes=ROPES[:2], eps="layer_norm_eps")
    return {
        **config,
        "use_qkv_bias": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "use_parallel_residual": draw(st.booleans()),
        **draw(st.sampled_from([{}, {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}])),
    }


@pytest.mark.parametrize("configs", [phi3s(), stablelms()], ids=["phi3", "stablelm"])
def test_any_configuration(reference, configs):
    prove_any(reference, configs)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "phi3": {  # all prompts are longer than the original context, so no token changes the frequencies
        "original_max_position_embeddings": 4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 9.0],
        },
        "sliding_window": 11,
    },
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
}


def rope(**changes):
    return lambda block: mixer(position=replace(block.mixer.position, **changes))(block)


def scaling(**changes):
    return lambda block: rope(scaling=replace(block.mixer.position.scaling, **changes))(block)


def qk_norm(**changes):
    return lambda block: mixer(qk_norm=replace(block.mixer.qk_norm, **changes))(block)


WRONG = {
    "phi3": {
        "no window": mixer(window=None),
        "short factors": scaling(original_context=64, attention_factor=3.5**0.5),
        "no growth": scaling(attention_factor=1.0),
    },
    "stablelm": {
        "no bias": mixer(qkv_bias=False),
        "half of the head": rope(fraction=0.5),
        "no norm": mixer(qk_norm=None),
        "rms norm of the head": qk_norm(norm=RMSNorm()),
        "statistics of all heads": qk_norm(whole=True),
        "rms norm": lambda block: replace(block, norm=RMSNorm()),
        "no bias of norms": lambda block: replace(block, norm=LayerNorm(bias=False)),
    },
}


proved = proved_each(SIZES, CONFIGS)


def test_each_switch_moves_the_logits(proved):
    name, imported = proved
    all_seen(imported, WRONG[name])
