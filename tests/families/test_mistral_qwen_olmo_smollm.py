"""Mistral, Qwen2, Qwen3, OLMo 2 and 3, and SmolLM3 over the space of their configurations."""

from dataclasses import dataclass

import pytest
from families.llama_shaped import all_seen, common, mixer, proved_each
from families.proof import prove_any
from hypothesis import strategies as st

from slmjax.nn.attention import QKNorm
from slmjax.nn.block import PostBranch
from slmjax.nn.norm import RMSNorm
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import Yarn


@st.composite
def mistrals(draw):
    # Longer than the window: proved on 24 tokens.
    return {**common(draw, "mistral"), "sliding_window": draw(st.sampled_from([None, 5, 23, 100]))}


def windows(draw, layers):
    """The window of some layers, as old files say it or as new ones do."""
    return draw(
        st.sampled_from(
            [
                {},
                {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
                {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
                {
                    "use_sliding_window": True,
                    "sliding_window": 7,
                    "layer_types": [("full_attention", "sliding_attention")[i % 2] for i in range(layers)],
                },
            ]
        )
    )


@st.composite
def qwens(draw, model_type):
    config = common(draw, model_type, layers=(2, 3))
    biases = {"attention_bias": draw(st.booleans())} if model_type == "qwen3" else {}
    return {**config, **windows(draw, config["num_hidden_layers"]), **biases}


@st.composite
def olmo2s(draw):
    return {**common(draw, "olmo2"), "attention_bias": draw(st.booleans())}


def of_two_kinds(theta, **scaling):
    """Positions of layers with a window and without in the words of transformers 5."""
    plain = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"sliding_attention": plain, "full_attention": {**plain, **scaling}}}


STRETCHED = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "attention_factor": 1.2}


@st.composite
def olmo3s(draw):
    linear = {"rope_type": "linear", "factor": 2.5}
    ropes = ({}, {"rope_theta": 5e5, "rope_scaling": STRETCHED}, of_two_kinds(1e3, **linear), of_two_kinds(3e2))
    config = common(draw, "olmo3", layers=(3, 5), ropes=ropes)
    n = config["num_hidden_layers"]
    kinds = [("full_attention", "sliding_attention")[i % 2] for i in range(n)]
    layers = draw(st.sampled_from([{}, {"layer_types": kinds}, {"layer_types": kinds[:1] * n, "sliding_window": None}]))
    window = {"sliding_window": draw(st.sampled_from([5, 23, 100]))}
    return {**config, **window, **layers, "attention_bias": draw(st.booleans())}


@st.composite
def smollm3s(draw):
    config = common(draw, "smollm3", layers=(3, 4))
    without = [{"no_rope_layers": [0, 1, 1, 1]}, {"no_rope_layers": [1] * 4}]
    where = draw(st.sampled_from([{}, {"no_rope_layer_interval": 2}, *without]))
    window = draw(st.sampled_from([{}, {"use_sliding_window": True, "sliding_window": 5}]))
    return {**config, **where, **window, "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}


@pytest.mark.parametrize(
    "configs",
    [mistrals(), qwens("qwen2"), qwens("qwen3"), olmo2s(), olmo3s(), smollm3s()],
    ids=["mistral", "qwen2", "qwen3", "olmo2", "olmo3", "smollm3"],
)
def test_any_configuration(reference, configs):
    prove_any(reference, configs)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}


@dataclass(frozen=True, kw_only=True)
class Outside(PostBranch):
    """The norms of OLMo 2, but of the sums, as in the first Transformer."""

    def __call__(self, layer, x, flow):
        y, flow = self.mixed(layer, x, flow)
        x = self.normed(layer, "attn_post_norm", x + y)
        y, flow = self.feed_forward(layer, x, flow)
        return self.normed(layer, "mlp_post_norm", x + y), flow


def outside(block):
    return Outside(mixer=block.mixer, mlp=block.mlp, norm=block.norm)


YARN = Yarn(factor=8.0, original_context=8, attention_factor=1.2)
WRONG = {
    "mistral": {"window": mixer(window=10), "no window": mixer(window=None)},
    "qwen2": {
        "no bias": mixer(qkv_bias=False),
        "windows everywhere": mixer(window=9),
        "no window": mixer(window=None),
    },
    "qwen3": {"no norm": mixer(qk_norm=None), "no window": mixer(window=None)},
    "olmo2": {
        "statistics of each head": mixer(qk_norm=QKNorm(norm=RMSNorm(), gain_per_head=True)),
        "norm of the sum": outside,
    },
    "olmo3": {
        "no window": mixer(window=None),
        "windows everywhere": mixer(window=9),
        "positions stretched nowhere": mixer(position=Rope(theta=1e3)),
        "positions stretched everywhere": mixer(position=Rope(theta=1e3, scaling=YARN)),
        "statistics of each head": mixer(qk_norm=QKNorm(norm=RMSNorm(), gain_per_head=True)),
    },
    "smollm3": {"positions everywhere": mixer(position=Rope(theta=2e6))},
}
GREEDY = {
    "mistral": {"sliding_window": 9},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS,
    "olmo2": {"num_key_value_heads": 4},
    "olmo3": {"sliding_window": 9, "num_hidden_layers": 6, **of_two_kinds(1e3, **STRETCHED)},
    "smollm3": {},
}


proved = proved_each(SIZES, GREEDY)


def test_each_switch_moves_the_logits(proved):
    name, imported = proved
    all_seen(imported, WRONG[name])
