"""Families of Llama's shape: published sizes and configurations, defaults of the classes, what is refused."""

from dataclasses import replace

import pytest

from slmjax.convert.hf import family_of
from slmjax.errors import UserError
from slmjax.models.families import (
    FAMILIES,
    gemma2,
    gemma3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)
from slmjax.models.families.common import phi3_factors
from slmjax.models.flops import parameter_count
from slmjax.nn.initial import Normal
from slmjax.nn.position import NoPosition, Rope
from slmjax.nn.rope_scaling import LinearScaling

# Parameters of the files on the Hugging Face hub, a tied table counted once.
PUBLISHED = {
    mistral.mistral_7b_v0_1: ("Mistral", 7_241_732_096),
    mistral.mistral_7b_v0_3: ("Llama", 7_248_023_552),  # no window: a Llama
    mistral.mistral_nemo_12b: ("Llama", 12_247_782_400),
    qwen2.qwen2_0_5b: ("Qwen2", 494_032_768),
    qwen2.qwen2_1_5b: ("Qwen2", 1_543_714_304),
    qwen2.qwen2_5_0_5b: ("Qwen2", 494_032_768),
    qwen2.qwen2_5_1_5b: ("Qwen2", 1_543_714_304),
    qwen2.qwen2_5_3b: ("Qwen2", 3_085_938_688),
    qwen2.qwen2_5_7b: ("Qwen2", 7_615_616_512),
    qwen3.qwen3_0_6b: ("Qwen3", 596_049_920),
    qwen3.qwen3_1_7b: ("Qwen3", 1_720_574_976),
    qwen3.qwen3_4b: ("Qwen3", 4_022_468_096),
    qwen3.qwen3_8b: ("Qwen3", 8_190_735_360),
    olmo2.olmo2_1b: ("OLMo 2", 1_484_916_736),
    olmo2.olmo2_7b: ("OLMo 2", 7_298_617_344),
    olmo3.olmo3_7b: ("OLMo 3", 7_298_011_136),
    olmo3.olmo3_32b: ("OLMo 3", 32_233_522_176),
    smollm3.smollm3_3b: ("SmolLM3", 3_075_098_624),
    phi3.phi3_mini_4k: ("Mistral", 3_821_079_552),  # a window, whole heads: a Mistral
    phi3.phi3_5_mini: ("Mistral", 3_821_079_552),
    phi3.phi4_mini: ("Phi-3", 3_836_021_760),
    stablelm.stablelm_3b_4e1t: ("StableLM", 2_795_443_200),
    # Computed from the published configurations.
    stablelm.stablelm_2_1_6b: ("StableLM", 1_644_515_328),
    stablelm.stablelm_2_12b: ("StableLM", 12_143_185_920),
    gemma2.gemma2_2b: ("Gemma 2", 2_614_341_888),
    gemma2.gemma2_9b: ("Gemma 2", 9_241_705_984),
    gemma3.gemma3_270m: ("Gemma 3", 268_098_176),
    gemma3.gemma3_1b: ("Gemma 3", 999_885_952),
}
FAMILY = {family.model_type: family for family in FAMILIES}


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_published_sizes(size):
    family, parameters = PUBLISHED[size]
    decoder = size()
    assert parameter_count(decoder) == parameters
    assert f"{parameters:,} parameters" in size.__doc__
    assert family_of(decoder).name == family
    own = next(f for f in FAMILIES if size in f.sizes.values())
    assert own.from_config(own.to_config(decoder)) == decoder


COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
COMMON |= {"transformers_version": "4.37.2", "use_cache": True, "initializer_range": 0.02}
MISTRAL = {
    **COMMON,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2 = {
    **COMMON,
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    **COMMON,
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMO2 = {
    **COMMON,
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
OLMO3 = {
    **OLMO2,
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "vocab_size": 100278,
}
SMOLLM3 = {
    **COMMON,
    "model_type": "smollm3",
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
GEMMA = {
    **{key: value for key, value in COMMON.items() if key != "hidden_act"},
    "attention_bias": False,
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 26,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
}
GEMMA2 = {
    **GEMMA,
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3 = {
    **GEMMA,
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PHI4 = {
    **COMMON,
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": list(phi3_factors.PHI_4_MINI.short),
        "long_factor": list(phi3_factors.PHI_4_MINI.long),
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
STABLELM = {
    **COMMON,
    "model_type": "stablelm",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "vocab_size": 50304,
}
CONFIGS = {
    phi3.phi4_mini: PHI4,
    stablelm.stablelm_3b_4e1t: STABLELM,
    gemma2.gemma2_2b: GEMMA2,
    gemma3.gemma3_1b: GEMMA3,
    mistral.mistral_7b_v0_1: MISTRAL,
    qwen2.qwen2_5_0_5b: QWEN2,
    qwen3.qwen3_0_6b: QWEN3,
    olmo2.olmo2_1b: OLMO2,
    olmo3.olmo3_7b: OLMO3,
    smollm3.smollm3_3b: SMOLLM3,
}


@pytest.mark.parametrize("size", CONFIGS, ids=lambda f: f.__name__)
def test_published_configurations_are_the_published_sizes(size):
    """As the files of transformers 4 say it, and in the words of 5."""
    config = dict(CONFIGS[size])
    read = FAMILY[config["model_type"]].from_config
    assert read(config) == replace(size(), initial=Normal(std=0.02))
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    if "rope_local_base_freq" in config:
        local = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    if config["model_type"] == "olmo3":
        local = {"rope_type": "default", "rope_theta": 500000}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    assert read(config) == size()


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "olmo2", "gemma2"])
def test_scaled_positions_of_both_versions(model_type):
    read = FAMILY[model_type].from_config
    old = {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}}
    assert read(old) == read(new)
    assert read(old).pattern[0].mixer.position == Rope(theta=1e5, scaling=LinearScaling(factor=4.0))


def test_defaults_are_those_of_the_configuration_classes():
    assert mistral.from_config({}).pattern[0].mixer.window == 4096
    assert mistral.from_config({"sliding_window": None}).pattern[0].mixer.window is None
    assert mistral.from_config({"num_key_value_heads": None}).pattern[0].mixer.kv_heads == 32
    assert qwen2.from_config({}).pattern[0].mixer.window is None
    assert qwen3.from_config({}).pattern[0].mixer.head_dim == 128
    assert olmo2.from_config({}).vocab == 50304
    mixers = [block.mixer for block in olmo3.from_config({}).blocks()]
    assert [(mixer.window, mixer.position) for mixer in mixers] == [
        (4096 if (i + 1) % 4 else None, Rope(theta=5e5)) for i in range(32)
    ]
    positions = [block.mixer.position for block in smollm3.from_config({}).blocks()]
    assert positions == [NoPosition() if i % 4 == 3 else Rope(theta=2e6) for i in range(36)]


def test_windows_from_the_layer_on_that_the_configuration_names():
    config = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    for read in (qwen2.from_config, qwen3.from_config):
        decoder = read(config)
        assert [block.mixer.window for block in decoder.blocks()] == [None] * 4 + [7] * 2
        assert [(len(s.pattern), s.repeats) for s in decoder.stages] == [(1, 4), (1, 2)]


STRETCHED = {"rope_type": "linear", "factor": 2.0}
NINE = {"rope_parameters": {"original_max_position_embeddings": 9}}


def test_longrope_as_older_and_newer_files_say_it():
    new = {key: value for key, value in PHI4.items() if key != "rope_scaling"}
    factors = {key: PHI4["rope_scaling"][key] for key in ("short_factor", "long_factor")}
    read = phi3.from_config(PHI4)
    assert phi3.from_config({**new, "rope_scaling": {"type": "su", **factors}}) == read  # the first name
    assert phi3.from_config({**new, "rope_parameters": {"rope_type": "longrope", "factor": 32.0, **factors}}) == read
    other = phi3.from_config({**new, "rope_parameters": {"rope_type": "longrope", "factor": 8.0, **factors}})
    assert other.pattern[0].mixer.position.scaling.factor == 8.0  # a given factor is not computed
    assert phi3.to_config(read)["rope_scaling"] == PHI4["rope_scaling"]
    assert phi3.to_config(other)["rope_scaling"]["factor"] == 8.0  # a key that makes transformers 4 refuse the file


def test_a_share_of_the_head_that_the_class_takes_for_granted_is_written():
    whole = stablelm.from_config({**STABLELM, "partial_rotary_factor": 1.0})
    assert stablelm.to_config(whole)["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert stablelm.from_config({}).pattern[0].mixer.position == Rope(theta=1e4, fraction=0.25)


@pytest.mark.parametrize(
    ("config", "change", "names"),
    [
        (MISTRAL, {"sliding_window": "4096"}, "sliding_window = '4096' is not int"),
        (MISTRAL, {"sliding_window": 0}, "window: 0"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (MISTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types names 1 layers; num_hidden_layers = 24"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "sliding_window is not set"),
        (QWEN2, {"use_mrope": True}, "use_mrope"),
        (QWEN3, {"num_experts": 8}, "num_experts"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias"),
        (OLMO2, {"clip_qkv": 8.0}, "clip_qkv"),
        (OLMO3, {"clip_qkv": 8.0}, "clip_qkv"),
        (OLMO3, {"sliding_window": None}, "sliding_window is not set"),
        (OLMO3, {"layer_types": ["full_attention"]}, "layer_types names 1 layers; num_hidden_layers = 32"),
        (OLMO3, {"rope_theta": 1e4}, "rope_theta = 10000 is that of full_attention alone"),
        (OLMO3, {"rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope_scaling.type is not read"),
        (OLMO3, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters has rope_type"),
        (OLMO3, {"rope_parameters": {"sliding_attention": STRETCHED}}, "sliding_attention has a rope_type other"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA2, {"hidden_act": "silu"}, "hidden_act and hidden_activation differ"),
        (GEMMA2, {"sliding_window": None}, "sliding_window is not set"),
        (GEMMA2, {"rope_local_base_freq": 5.0}, "rope_local_base_freq"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters has rope_type"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "rope_theta = 10000 but"),
        (GEMMA3, {"layer_types": ["sliding_attention"] * 26}, "sliding_window_pattern = 6"),
        (PHI4, {"full_attn_mod": 2}, "full_attn_mod = 2"),
        (PHI4, {"head_dim": 64}, "head_dim = 64"),
        (PHI4, {"attention_bias": True}, "attention_bias"),
        (PHI4, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "supports only default and longrope"),
        (PHI4, NINE, "original_max_position_embeddings = 4096 but rope_parameters has 9"),
        ({**PHI4, "original_max_position_embeddings": None}, NINE, "= 4096 but rope_parameters has 9"),
        (STABLELM, {"hidden_size": 2561}, "hidden_size = 2561 is not 32 heads"),
        (STABLELM, {"head_dim": 64}, "head_dim = 64"),
        (STABLELM, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        (STABLELM, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.25 but"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers = .1, 0."),
        (SMOLLM3, {"no_rope_layers": [2] * 36}, "no_rope_layers"),
        (SMOLLM3, {"layer_types": ["sliding_attention"] * 36}, "sliding_window is not set"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(config, change, names):
    with pytest.raises(UserError, match=names):
        FAMILY[config["model_type"]].from_config({**config, **change})
