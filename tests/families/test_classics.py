"""GPT-NeoX, BLOOM and OPT over the space of their configurations, and what must not be confused in them."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from contract.shapes import changed, padded, perturbed
from families.proof import logits, moves, prove, prove_any
from hypothesis import strategies as st

from slmjax.convert.export import export_hf
from slmjax.convert.hf import family_of, import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors, write
from slmjax.errors import UserError
from slmjax.models.decoder import Block
from slmjax.models.families import SIZES, bloom, cerebras_gpt, gpt_neox, opt
from slmjax.models.flops import parameter_count
from slmjax.nn.block import NormedStream, Parallel, ParallelShared, PostNorm
from slmjax.nn.mlp import gelu_tanh
from slmjax.nn.position import Alibi, Learned, NoPosition, Rope
from slmjax.nn.rope_scaling import LinearScaling
from slmjax.tree import flatten

# A head of 24 has 6 rotated channels at 0.25, one of 8 has 2: `int` cuts 0.4 * 24 = 9.6 to 9, which is odd and refused.
NEOX_ROPE = st.sampled_from(
    [
        {},
        {"rotary_pct": 0.5, "rotary_emb_base": 1000},
        {"rotary_pct": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}},
    ]
)


@st.composite
def gpt_neoxes(draw):
    heads, width = draw(st.sampled_from([(3, 24), (4, 32), (1, 24)]))
    return {
        "model_type": "gpt_neox",
        "vocab_size": 97,
        "hidden_size": width,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.sampled_from([40, 96])),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "max_position_embeddings": 64,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "use_parallel_residual": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        **draw(NEOX_ROPE),
    }


@st.composite
def blooms(draw):
    heads, width = draw(st.sampled_from([(3, 24), (6, 24), (12, 24), (4, 32)]))  # ALiBi: mostly no powers of 2
    return {
        "model_type": "bloom",
        "vocab_size": 97,
        "hidden_size": width,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "apply_residual_connection_post_layernorm": draw(st.booleans()),
    }


@st.composite
def opts(draw):
    heads, width = draw(st.sampled_from([(3, 24), (4, 32), (1, 20)]))
    return {
        "model_type": "opt",
        "vocab_size": 97,
        "hidden_size": width,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "ffn_dim": draw(st.sampled_from([40, 96])),
        "max_position_embeddings": 40,
        "activation_function": draw(st.sampled_from(["relu", "gelu"])),
        "word_embed_proj_dim": draw(st.sampled_from([width, 12])),
        "do_layer_norm_before": draw(st.booleans()),
        "enable_bias": draw(st.booleans()),
        "layer_norm_elementwise_affine": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@pytest.mark.parametrize("configs", [gpt_neoxes(), blooms(), opts()], ids=["gpt_neox", "bloom", "opt"])
def test_any_configuration(reference, configs):
    prove_any(reference, configs)


SMALL = {"vocab_size": 97, "hidden_size": 24}
CONFIGS = {
    "pythia": {"model_type": "gpt_neox", **SMALL, "num_hidden_layers": 2, "num_attention_heads": 3,
               "intermediate_size": 96, "max_position_embeddings": 128},
    "bloom": {"model_type": "bloom", **SMALL, "n_layer": 2, "n_head": 3},
    "bloom, stream normed": {"model_type": "bloom", **SMALL, "n_layer": 3, "n_head": 3,
                             "apply_residual_connection_post_layernorm": True},
    "opt-350m": {"model_type": "opt", **SMALL, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 96,
                 "max_position_embeddings": 128, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    "opt before 4.20": {"model_type": "opt", **SMALL, "num_hidden_layers": 1, "num_attention_heads": 3, "ffn_dim": 96,
                        "max_position_embeddings": 128, "_remove_final_layer_norm": True},
    "galactica-30b": {"model_type": "opt", **SMALL, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 96,
                      "max_position_embeddings": 128, "activation_function": "gelu", "enable_bias": False,
                      "layer_norm_elementwise_affine": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_64_greedy_tokens_are_identical(reference, tmp_path, name):
    prove(reference, tmp_path, CONFIGS[name], seed=2, tokens=64)


def test_the_form_of_opt_350m_passes_the_gate(reference, tmp_path):
    """Its last stage is narrower than its blocks."""
    decoder = opt.opt(
        layers=2, width=24, heads=3, vocab=97, context=64, table_width=12, wiring=PostNorm, final_norm=False
    )
    made = export_hf(decoder, perturbed(decoder), tmp_path / "hf", reference_python=reference.python)
    assert [check.passed for check in made.checks] == [True] * 5


def test_the_output_table_of_gpt_neox_is_read_under_both_names(tmp_path):
    decoder = gpt_neox.gpt_neox(layers=1, width=16, heads=2, vocab=31, context=8)
    params = perturbed(decoder)
    (tmp_path / "saved").mkdir()
    write_hf(tmp_path / "saved", decoder, params)
    saved = dict(Tensors(tmp_path / "saved"))
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    saved["lm_head.weight"] = saved.pop("embed_out.weight")
    write(tmp_path / "live", saved.items(), dtype="float32")
    for folder in ("saved", "live"):
        back = flatten(import_hf(tmp_path / folder).params)
        assert all(np.array_equal(back[path], x) for path, x in flatten(params).items())


NEOX = gpt_neox.gpt_neox(layers=2, width=24, heads=3, vocab=97, context=64)
BLOOM = bloom.bloom(layers=2, width=24, heads=3, vocab=97, context=64)
OPT = opt.opt(layers=2, width=24, heads=3, vocab=97, context=64)


def wired(decoder, kind):
    (block,) = decoder.pattern
    return replace(decoder, pattern=(kind(mixer=block.mixer, mlp=block.mlp, norm=block.norm),))


SCALED = Rope(fraction=0.25, scaling=LinearScaling(factor=4.0))
SWITCHES = {
    "one after the other, not side by side": (NEOX, wired(NEOX, Block)),
    "two norms side by side": (NEOX, wired(NEOX, ParallelShared)),
    "rotated share": (NEOX, changed(NEOX, mixer={"position": Rope(fraction=0.75)})),
    "rotary scaling": (NEOX, changed(NEOX, mixer={"position": SCALED})),
    "tanh or erf": (NEOX, changed(NEOX, mlp={"activation": gelu_tanh})),
    "alibi": (BLOOM, changed(BLOOM, mixer={"position": NoPosition()})),
    "the stream normed": (BLOOM, wired(BLOOM, NormedStream)),
    "norm of the embedding": (BLOOM, replace(BLOOM, embed_norm=None)),
    "first row of positions": (OPT, replace(OPT, position=Learned(), context=OPT.context + 2)),
    "norm after": (OPT, wired(OPT, PostNorm)),
    "final norm": (OPT, replace(OPT, final_norm=None)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_one_wrong_switch_would_be_seen(name):
    right, wrong = SWITCHES[name]
    assert moves(right, wrong, perturbed(right))


@pytest.mark.parametrize("parallel", [Parallel, Block])
def test_each_is_of_one_family(parallel):
    names = {"GPT-NeoX": wired(NEOX, parallel), "BLOOM": BLOOM, "OPT": OPT}
    assert {name: family_of(decoder).name for name, decoder in names.items()} == {name: name for name in names}


# Pythia: README of EleutherAI/pythia, 14m and 31m the files on the hub. BLOOM: model cards. OPT: files on the hub.
# Galactica and Cerebras-GPT: computed from the published configurations; their cards round.
PUBLISHED = {
    "pythia/14m": 14_067_712,
    "pythia/31m": 30_494_720,
    "pythia/70m": 70_426_624,
    "pythia/160m": 162_322_944,
    "pythia/410m": 405_334_016,
    "pythia/1b": 1_011_781_632,
    "pythia/1.4b": 1_414_647_808,
    "bloom/560m": 559_214_592,
    "bloom/1.1b": 1_065_314_304,
    "opt/125m": 125_239_296,
    "opt/350m": 331_196_416,
    "opt/1.3b": 1_315_758_080,
    "galactica/125m": 125_030_400,
    "galactica/1.3b": 1_315_201_024,
    "cerebras-gpt/111m": 111_050_496,
    "cerebras-gpt/256m": 255_977_024,
    "cerebras-gpt/590m": 590_310_912,
    "cerebras-gpt/1.3b": 1_315_723_264,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameter_count(SIZES[name]()) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,} parameters" in SIZES[name].__doc__
    assert family_of(SIZES[name]()).from_config(family_of(SIZES[name]()).to_config(SIZES[name]())) == SIZES[name]()


def test_the_published_configuration_of_pythia():
    """config.json of EleutherAI/pythia-160m, as transformers 4 wrote it."""
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
        "use_parallel_residual": True, "vocab_size": 50304,
    }  # fmt: skip
    assert gpt_neox.from_config(config) == gpt_neox.pythia_160m()


def test_the_published_configuration_of_bloom():
    """config.json of bigscience/bloom-560m: the older names of the sizes."""
    config = {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "unk_token_id": 0, "hidden_dropout": 0.0, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024,
        "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1,
        "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False, "transformers_version": "4.20.0",
        "use_cache": True, "vocab_size": 250880,
    }  # fmt: skip
    assert bloom.from_config(config) == bloom.bloom_560m()


def test_defaults_are_those_of_the_configuration_classes():
    assert gpt_neox.from_config({}) == gpt_neox.gpt_neox(layers=44, width=6144, heads=64, hidden=24576, vocab=50432)
    assert bloom.from_config({}) == bloom.bloom(layers=2, width=64, heads=8)
    assert opt.from_config({}) == opt.opt_125m()
    assert opt.from_config({"num_hidden_layers": 3, "word_embed_proj_dim": 768}).table_width is None


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        (gpt_neox, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (gpt_neox, {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        (gpt_neox, {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct = 0.5; remove one"),
        (gpt_neox, {"rotary_emb_base": 5e4, "rope_theta": 1e4}, "rope_theta = 10000.0 but rotary_emb_base = 50000.0"),
        (gpt_neox, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (gpt_neox, {"sliding_window": 7}, "sliding_window"),
        (bloom, {"n_layer": 3, "num_hidden_layers": 4}, "n_layer = 3 but num_hidden_layers = 4"),
        (bloom, {"n_inner": 7}, "n_inner = 7"),
        (bloom, {"alibi": True}, "alibi"),
        (opt, {"activation_function": "swish"}, "activation_function = 'swish'"),
        (opt, {"scale_embeddings": True}, "scale_embeddings = True"),
        (opt, {"_remove_final_layer_norm": "yes"}, "remove_final_layer_norm = 'yes' is not bool"),
        (opt, {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_unsupported_fields_are_refused_by_name(family, config, names):
    with pytest.raises(UserError, match=names):
        family.from_config(config)


def test_slopes_of_a_number_of_heads_that_is_no_power_of_2():
    """Press et al. 2021, appendix: 6 heads have those of 4, then every second one of 8."""
    np.testing.assert_allclose(Alibi().slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-6)


def test_mup_is_the_formula():
    """A scaled copy of a GPT-2, by hand: vectors times m, scores times 1/d, logits times alpha * base / width."""
    sizes = {"layers": 1, "width": 32, "heads": 2, "vocab": 31, "context": 16}
    plain = cerebras_gpt.cerebras_gpt(**sizes)
    made = cerebras_gpt.cerebras_gpt_mup(**sizes, base_width=8, embed_multiplier=3.0, output_multiplier=2.0)
    params = perturbed(plain)
    tokens, mask = padded(plain, rows=2, length=12)
    by_hand = jax.tree.map(np.array, params)
    for path in ("table", "positions"):
        by_hand["embed"][path] *= 3.0
    by_hand["layers"]["attn"]["q"] *= 16**-0.5
    by_hand["layers"]["attn"]["q_bias"] *= 16**-0.5
    # The tied table of the copy is 3 times the table, and so are its logits.
    expected = logits(plain, by_hand, tokens, mask) / 3.0 * (2.0 * 8 / 32)
    np.testing.assert_allclose(logits(made, params, tokens, mask), expected, rtol=1e-4, atol=1e-5)
