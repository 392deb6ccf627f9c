"""What is exported means the same to the newest transformers 4 and to transformers 5: same file, same logits.

The configurations are unusual throughout: a version that does not find a value where it looks for it falls back to a
default of its own, silently, and computes something else.
"""

import pytest
from contract.shapes import padded, perturbed
from families.proof import NOTHING, assert_close, logits, same_greedy
from families.test_encoders import BERT, DISTIL, GAIN, LABELS, MOBILE, compare, probe, told

from slmjax.convert.hf import import_hf, write_hf
from slmjax.data.tokenizer import Bytes
from slmjax.models.families import FAMILIES

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
EPS = {"rms_norm_eps": 3e-3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 3e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 7e2, "factor": 2.5}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
FACTORS = {"short_factor": [1.0, 1.2, 1.5, 1.9], "long_factor": [1.0, 2.0, 4.0, 8.0]}
PHI3 = {**SIZES, **EPS, "original_max_position_embeddings": 16, "sliding_window": 11}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {
    **SIZES, **EPS, "head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": 9, "num_hidden_layers": 4,
    "final_logit_softcapping": 9.0, "attention_bias": True,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "layer_norm_eps": 1e-3, "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "llama, theta": {"model_type": "llama", **SIZES, **EPS, "rope_theta": 5e5, "head_dim": 12},
    "llama, llama3": {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3, "attention_bias": True},
    "llama, linear": {"model_type": "llama", **SIZES, "rope_parameters": LINEAR, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **SIZES, **EPS, "rope_theta": 3e3, "sliding_window": 7, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **SIZES, **EPS, "rope_theta": 2e6, **WINDOWS},
    "qwen2, yarn": {"model_type": "qwen2", **SIZES, **EPS, "rope_scaling": {"type": "yarn", **YARN}},
    "qwen3": {"model_type": "qwen3", **SIZES, **EPS, "rope_theta": 2e6, "head_dim": 12, **WINDOWS},
    "olmo2": {"model_type": "olmo2", **SIZES, **EPS, "rope_theta": 3e3},
    "olmo3": {"model_type": "olmo3", **SIZES, **EPS, "num_hidden_layers": 5, "sliding_window": 7, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", **YARN, "rope_theta": 3e3, "beta_fast": 6.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}}},
    "smollm3": {"model_type": "smollm3", **SIZES, **EPS, "rope_theta": 3e3, "no_rope_layers": [1, 0, 1]},
    "granite": {"model_type": "granite", **SIZES, **EPS, "rope_theta": 3e3, "embedding_multiplier": 5.0,
                "attention_multiplier": 0.07, "residual_multiplier": 0.3, "logits_scaling": 0.4},
    "lfm2": {"model_type": "lfm2", **SIZES, "norm_eps": 3e-3, "rope_theta": 3e3, "conv_L_cache": 4,
             "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
    "gpt_neox": {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 700, "use_parallel_residual": False},
    "gpt_neox, all of each head": {**NEOX, "rotary_pct": 1.0, "rotary_emb_base": 5e4},
    "gpt_neox, yarn": {**NEOX, "rope_parameters": {
        "rope_type": "yarn", **YARN, "rope_theta": 3e3, "partial_rotary_factor": 0.75, "beta_fast": 6.0,
        "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "gpt_neox, linear": {**NEOX, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.75}},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
             "n_inner": 56, "activation_function": "gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "gpt2, scores by layer": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 2,
                              "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 24, "n_layer": 2, "n_head": 3,
              "layer_norm_epsilon": 1e-3, "apply_residual_connection_post_layernorm": True},
    "opt": {"model_type": "opt", "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 3, "ffn_dim": 56, "max_position_embeddings": 64, "word_embed_proj_dim": 12,
            "do_layer_norm_before": False, "activation_function": "gelu"},
    "gemma2": {"model_type": "gemma2", **GEMMA, "rope_theta": 3e3, "attn_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "rope_theta": 5e4, "rope_local_base_freq": 3e2,
               "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3", **PHI3, "rope_theta": 3e3},
    "phi3, a part of each head": {"model_type": "phi3", **PHI3, "rope_theta": 3e3, "partial_rotary_factor": 0.5},
    "phi3, longrope": {"model_type": "phi3", **PHI3, "rope_scaling": {"type": "longrope", **FACTORS}},
    "phi3, longrope, short text": {
        "model_type": "phi3", **PHI3, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **FACTORS},
    },
    "stablelm": {"model_type": "stablelm", **SIZES, "layer_norm_eps": 1e-3, "rope_theta": 3e3, "use_qkv_bias": True,
                 "partial_rotary_factor": 0.75, "qk_layernorm": True, "use_parallel_residual": True},
    "stablelm, all of each head": {"model_type": "stablelm", **SIZES, "rope_theta": 3e3,
                                   "partial_rotary_factor": 1.0},
}  # fmt: skip
ENCODERS = {
    "bert": {**BERT, "architectures": ["BertForMaskedLM"], "layer_norm_eps": 1e-3, "hidden_act": "gelu_new"},
    "bert, labels": {**BERT, **LABELS, "architectures": ["BertForSequenceClassification"]},
    "distilbert": {**DISTIL, "architectures": ["DistilBertForMaskedLM"], "activation": "relu"},
    "distilbert, labels": {**DISTIL, **LABELS, "architectures": ["DistilBertForSequenceClassification"]},
    "mobilebert": {**MOBILE, "architectures": ["MobileBertForMaskedLM"], "num_feedforward_networks": 3},
}
BY_TYPE = {family.model_type: family for family in FAMILIES}


def test_longrope_that_transformers_4_cannot_compute_is_refused_by_it(reference, reference4, tmp_path):
    """It computes the factor and the growth of scores by itself: a file with others must not be read silently."""
    parameters = {"rope_type": "longrope", "rope_theta": 3e3, "attention_factor": 1.5, **FACTORS}
    family = BY_TYPE["phi3"]
    decoder = family.from_config({"model_type": "phi3", **PHI3, "rope_parameters": parameters})
    params = perturbed(decoder)
    write_hf(tmp_path, decoder, params, family=family)
    tokens, mask = padded(decoder, rows=2, length=24)
    theirs, _ = reference.logits(tmp_path, tokens, mask)
    assert_close(logits(decoder, params, tokens, mask), theirs["logits"], mask)
    with pytest.raises(AssertionError, match="must be a dictionary with three fields"):
        reference4.logits(tmp_path, tokens, mask)


def test_the_versions_are_4_and_5(reference, reference4):
    assert reference4.version().startswith("4.")
    assert reference.version().startswith("5.")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder(reference, reference4, tmp_path, name):
    config = DECODERS[name]
    family = BY_TYPE[config["model_type"]]
    decoder = family.from_config(config)
    params = perturbed(decoder)
    write_hf(tmp_path, decoder, params, family=family)
    # the convolution of LFM2 reads padding as text in transformers 4, whatever the file says
    tokens, mask = padded(decoder, rows=1 if name == "lfm2" else 2, length=24)
    ours = logits(decoder, params, tokens, mask)
    for stock in (reference4, reference):
        theirs, report = stock.logits(tmp_path, tokens, mask)
        assert report == NOTHING
        assert_close(ours, theirs["logits"], mask)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder(reference, reference4, tmp_path, name):
    config = ENCODERS[name]
    reference.make(tmp_path / "theirs", config, gain=GAIN[config["model_type"]])
    imported = import_hf(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", imported.decoder, imported.params)
    tokens, mask, types = probe(imported.decoder, 0)
    ours, _ = told(imported.decoder, imported.params, tokens, mask, types)
    for stock in (reference4, reference):
        theirs, report = stock.logits(tmp_path / "ours", tokens, mask, types=types)
        assert report == NOTHING
        compare(ours, theirs["logits"], mask, imported.family.stock(imported.decoder).first)


def test_the_tokenizer_and_greedy_text(reference, reference4, tmp_path):
    made = Bytes().make([], tmp_path)
    decoder = BY_TYPE["llama"].from_config({**DECODERS["llama, theta"], "vocab_size": 300})
    write_hf(tmp_path, decoder, perturbed(decoder), tokenizer=made)
    texts = ["the quick a", "  the\n\nquick!", "naïve 🙂"]
    for stock in (reference4, reference):
        theirs = stock.tokenize(tmp_path, texts)
        assert theirs["ids"] == [made.encode(text, bos=True) for text in texts]
        assert theirs["decoded"] == texts
        assert (theirs["bos"], theirs["eos"]) == (made.bos_id, made.eos_id)
        same_greedy(stock, tmp_path, import_hf(tmp_path), 16)


def test_every_family_is_compared():
    """But for those whose class is remote code."""
    compared = {config["model_type"] for config in (*DECODERS.values(), *ENCODERS.values())}
    assert {family.model_type for family in FAMILIES if family.model_type} - compared == {
        "minicpm",
        "openelm",
        "openlm",
    }
