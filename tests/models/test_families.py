"""Published sizes, and configurations read and written. Parity with transformers itself is in tests/convert."""

from dataclasses import replace

import pytest
from contract.shapes import changed
from models.tiny import tiny_gpt2, tiny_llama, tiny_pattern

from slmjax.convert.hf import family_of
from slmjax.errors import UserError
from slmjax.models.families import gpt2, llama
from slmjax.models.families.common.rows import Row
from slmjax.models.flops import Flops, flops_per_token, nonembedding_count, parameter_count
from slmjax.nn.initial import Normal
from slmjax.nn.mlp import gelu, gelu_tanh, relu
from slmjax.nn.norm import LayerNorm
from slmjax.nn.position import Learned, NoPosition
from slmjax.nn.rope_scaling import Llama3Scaling

# Parameters of the files on the Hugging Face hub, a tied table counted once.
PUBLISHED = {
    llama.smollm2_135m: 134_515_008,
    llama.smollm2_360m: 361_821_120,
    llama.smollm2_1_7b: 1_711_376_384,
    llama.tinyllama_1_1b: 1_100_048_384,
    llama.llama_3_2_1b: 1_235_814_400,
    llama.llama_3_2_3b: 3_212_749_824,
    llama.llama_3_1_8b: 8_030_261_248,
    # Computed from the published configurations; the papers say 1.4B, 2.7B, 124.6M and 345.3M.
    llama.mobilellama_1_4b: 1_364_297_728,
    llama.mobilellama_2_7b: 2_701_560_320,
    llama.mobilellm_125m: 124_635_456,
    llama.mobilellm_350m: 345_355_200,
    gpt2.gpt2_small: 124_439_808,
    gpt2.gpt2_medium: 354_823_168,
    gpt2.gpt2_large: 774_030_080,
    gpt2.gpt2_xl: 1_557_611_200,
    # GPT-2 and one row of the table, for [PAD].
    gpt2.lamini_gpt_124m: 124_439_808 + 768,
    gpt2.lamini_gpt_774m: 774_030_080 + 1280,
    gpt2.lamini_gpt_1_5b: 1_557_611_200 + 1600,
}
LLAMAS = {
    "tied": tiny_llama(),
    "untied": tiny_llama(tied=False),
    "biases": tiny_llama(attention_bias=True, mlp_bias=True),
    "wide heads": tiny_llama(head_dim=16),
    "theta": tiny_llama(theta=5e5, eps=1e-6, context=77),
    "llama3": tiny_llama(scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_context=512)),
    "gelu": tiny_llama(activation=gelu_tanh),
    "initial": replace(tiny_llama(), initial=Normal(std=0.05)),
}
GPT2S = {
    "tied": tiny_gpt2(),
    "untied": tiny_gpt2(tied=False),
    "relu": tiny_gpt2(activation=relu, hidden=50),
    "no scale": tiny_gpt2(scale=1.0, eps=1e-6),
    "initial": replace(tiny_gpt2(), initial=Normal(std=0.05)),
}


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_published_parameter_counts(size):
    assert parameter_count(size()) == PUBLISHED[size]
    assert f"{PUBLISHED[size]:,} parameters" in size.__doc__


def test_flops_under_four_conventions():
    """SmolLM2-135M by hand: d 576, 30 layers, q 576, kv 192, hidden 1536, vocabulary 49152."""
    layer = 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536 + 2 * 576
    inside = 30 * layer + 576
    assert nonembedding_count(llama.smollm2_135m()) == inside
    head = 6 * (inside + 49152 * 576)
    expected = Flops(6 * inside, head, head + 6 * 1024 * 576 * 30, 6 * 134_515_008)
    assert flops_per_token(llama.smollm2_135m(), 1024) == expected
    # Untied: the head is a parameter, the embedding still is not computed with.
    untied = flops_per_token(tiny_llama(tied=False), 10)
    assert untied[:3] == flops_per_token(tiny_llama(), 10)[:3]
    assert untied.total - flops_per_token(tiny_llama(), 10).total == 6 * 61 * 32
    # Learned positions are tables too.
    assert parameter_count(tiny_gpt2()) - nonembedding_count(tiny_gpt2()) == (61 + 64) * 32
    # Two blocks a repeat count twice; attention wider than the model counts by its own width.
    pattern = flops_per_token(tiny_pattern(), 10)
    assert pattern.attention - pattern.head == 6 * 10 * 32 * 4
    wide = flops_per_token(tiny_llama(head_dim=16), 10)
    assert wide.attention - wide.head == 6 * 10 * 64 * 3


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_configurations_round_trip(name):
    decoder = LLAMAS[name]
    assert llama.from_config(llama.to_config(decoder)) == decoder
    assert gpt2.to_config(decoder) is None


@pytest.mark.parametrize("name", GPT2S)
def test_gpt2_configurations_round_trip(name):
    decoder = GPT2S[name]
    assert gpt2.from_config(gpt2.to_config(decoder)) == decoder
    assert llama.to_config(decoder) is None


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_each_published_size_is_exported_as_its_own_family(size):
    assert family_of(size()).name == ("GPT-2" if size.__module__.endswith("gpt2") else "Llama")


@pytest.mark.parametrize(
    "decoder",
    [
        tiny_pattern(),
        replace(tiny_llama(), final_norm=LayerNorm()),
        replace(tiny_llama(), position=Learned()),
        changed(tiny_llama(), mixer={"position": NoPosition()}),
        changed(tiny_llama(), mixer={"qkv_bias": True, "scale": 0.3}),
        changed(tiny_llama(), mixer={"scale": 0.3}),
        changed(tiny_gpt2(), mixer={"kv_heads": 2}),
        changed(tiny_gpt2(), mixer={"scale": 0.3}),
        changed(tiny_gpt2(), mixer={"head_dim": 16}),
        changed(tiny_gpt2(), norm=LayerNorm(bias=False)),
        replace(tiny_gpt2(), position=None),
    ],
)
def test_what_a_class_cannot_express_it_leaves_to_others(decoder):
    assert all(f.to_config(decoder) is None for f in (llama.FAMILY, gpt2.FAMILY))


def test_tables_cover_each_parameter_once():
    for family, decoders in ((llama.FAMILY, LLAMAS), (gpt2.FAMILY, GPT2S)):
        for decoder in decoders.values():
            rows = family.rows(decoder)
            ours = [path for r in rows for path in ((r.ours,) if isinstance(r.ours, str) else r.ours)]
            assert sorted(ours) == sorted(decoder.paths())
            assert len({r.theirs for r in rows}) == len(rows)
            assert all(isinstance(r, Row) and (r.split is None) == isinstance(r.ours, str) for r in rows)


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def test_published_configuration_is_the_published_size():
    expected = replace(llama.smollm2_135m(), initial=Normal(std=0.041666666666666664))
    assert llama.from_config(SMOLLM2) == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}},
    ],
    ids=["transformers 4", "transformers 4, older key", "transformers 5"],
)
def test_rope_keys_of_both_versions(rope):
    config = {k: v for k, v in SMOLLM2.items() if not k.startswith("rope_")}
    position = llama.from_config({**config, **rope}).pattern[0].mixer.position
    assert position == llama.llama_3_2_1b().pattern[0].mixer.position


def test_defaults_are_those_of_the_configuration_classes():
    assert llama.from_config({}) == llama.llama(
        layers=32, width=4096, heads=32, kv_heads=32, hidden=11008, vocab=32000, tied=False, eps=1e-6
    )
    assert gpt2.from_config({"n_ctx": 1024, "n_inner": None}) == gpt2.gpt2_small()
    assert gpt2.from_config({"activation_function": "gelu"}).pattern[0].mlp.activation is gelu


@pytest.mark.parametrize(
    ("family", "change", "names"),
    [
        (llama, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (llama, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (llama, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta = 100000 but"),
        (llama, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (llama, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (llama, {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        (llama, {"pretraining_tp": 2}, "pretraining_tp = 2"),
        (llama, {"sliding_window": 4096}, "sliding_window = 4096"),
        (llama, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (llama, {"rope_interleaved": True}, "rope_interleaved"),
        (llama, {"num_hidden_layers": "30"}, "num_hidden_layers = '30' is not int"),
        (llama, {"num_hidden_layers": True}, "num_hidden_layers = True is not int"),
        (llama, {"num_key_value_heads": 2}, "kv_heads: 2 does not divide"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": 2}, "scale_attn_by_inverse_layer_idx = 2 is not bool"),
        (gpt2, {"add_cross_attention": True}, "add_cross_attention = True"),
        (gpt2, {"activation_function": "swish2"}, "activation_function = 'swish2'"),
        (gpt2, {"alibi": True}, "alibi"),
    ],
)
def test_unsupported_fields_are_refused_by_name(family, change, names):
    with pytest.raises(UserError, match=names):
        family.from_config({**(SMOLLM2 if family is llama else {}), **change})
