"""What the proofs of families of Llama's shape share: config.json values, and wrong switches."""

from dataclasses import replace

import pytest
from families.proof import moves, prove
from hypothesis import strategies as st

SHAPES = (  # heads, kv_heads, head_dim, width; the heads of the second and third do not share the width
    {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 24},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 32},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10, "hidden_size": 28},
)
ROPES = (
    {"rope_theta": 1e3},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
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
)


def common(draw, model_type, *, layers=(1, 3), shapes=SHAPES, ropes=ROPES, eps="rms_norm_eps", activation="hidden_act"):
    """Sizes, positions, norm and activation."""
    return {
        "model_type": model_type,
        "vocab_size": 97,
        "intermediate_size": draw(st.sampled_from([40, 56])),
        "num_hidden_layers": draw(st.integers(*layers)),
        "max_position_embeddings": 64,
        "pad_token_id": None,  # the ids of some classes lie beyond so small a vocabulary
        eps: draw(st.sampled_from([1e-6, 1e-3])),
        activation: draw(st.sampled_from(["silu", "gelu_pytorch_tanh", "relu"])),
        "tie_word_embeddings": draw(st.booleans()),
        **draw(st.sampled_from(shapes)),
        **draw(st.sampled_from(ropes)),
    }


def every_block(decoder, change):
    """The decoder with each block changed."""
    stages = [replace(stage, pattern=tuple(map(change, stage.pattern))) for stage in decoder.stages]
    first, *tail = stages
    return replace(decoder, pattern=first.pattern, repeats=first.repeats, tail=tuple(tail))


def proved_each(sizes, configs):
    """A fixture for a module: the model_type, and what `prove` has imported with 64 tokens, of each configuration."""

    @pytest.fixture(params=configs, scope="module")
    def proved(request, reference, tmp_path_factory):
        config = {**sizes, "model_type": request.param, **configs[request.param]}
        return request.param, prove(reference, tmp_path_factory.mktemp(request.param), config, seed=1, tokens=64)

    return proved


def all_seen(imported, wrong):
    """Each of these changes of all blocks moves the logits."""
    for what, change in wrong.items():
        assert moves(imported.decoder, every_block(imported.decoder, change), imported.params), what


def mixer(**changes):
    """block -> the block with other fields of its mixer."""
    return lambda block: replace(block, mixer=replace(block.mixer, **changes))
