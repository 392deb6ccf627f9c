"""Llama and GPT-2 over the space of their configurations."""

import pytest
from families.proof import prove_any
from hypothesis import strategies as st

ROPE = st.sampled_from(
    [
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ]
)
HEADS = st.sampled_from([(3, 1, 8, 24), (4, 2, 6, 32), (2, 2, 16, 32)])  # heads, kv_heads, head_dim, width


@st.composite
def llamas(draw):
    heads, kv_heads, head_dim, width = draw(HEADS)
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": width,
        "intermediate_size": draw(st.sampled_from([40, 56])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        **draw(ROPE),
    }


@st.composite
def gpt2s(draw):
    heads, width = draw(st.sampled_from([(3, 24), (4, 32), (1, 20)]))
    return {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": width,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_positions": 48,
        "n_inner": draw(st.sampled_from([None, 50])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_weights": draw(st.booleans()),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
    }


@pytest.mark.parametrize("configs", [llamas(), gpt2s()], ids=["llama", "gpt2"])
def test_any_configuration(reference, configs):
    prove_any(reference, configs)
