"""Llama and GPT-2 over the space of their configurations."""

import pytest
from families.llama_shaped import common
from families.proof import prove_any
from hypothesis import strategies as st


@st.composite
def llamas(draw):
    return {**common(draw, "llama"), "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}


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
