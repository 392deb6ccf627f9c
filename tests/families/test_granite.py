"""Granite against stock transformers; MiniCPM against its paper, and what it becomes when it is exported."""

import json
from dataclasses import replace

import numpy as np
import pytest
from contract.shapes import padded
from families.llama_shaped import SHAPES
from families.paper_proof import prove_any_paper, prove_paper
from families.proof import assert_close, moves, prove, prove_any
from hypothesis import strategies as st

from slmjax.convert.hf import family_of, import_hf, write_hf
from slmjax.errors import UserError
from slmjax.models.families import granite, llama
from slmjax.models.flops import nonembedding_count, parameter_count
from slmjax.nn.embedding import Logits


def granite_config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    scalars = {
        "embedding_multiplier": 5.0, "attention_multiplier": 0.07, "residual_multiplier": 0.3, "logits_scaling": 0.4,
    }  # fmt: skip
    return {"model_type": "granite", **sizes, **scalars, **changes}


@st.composite
def granites(draw):
    return granite_config(
        **draw(st.sampled_from(SHAPES)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        embedding_multiplier=draw(st.sampled_from([1.0, 12, 3.3])),
        attention_multiplier=draw(st.sampled_from([1.0, 0.015625, 0.3])),
        residual_multiplier=draw(st.sampled_from([1.0, 0.22])),
        logits_scaling=draw(st.sampled_from([0.5, 0.49, 3])),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 5e6]))},
    )


def test_any_granite(reference):
    prove_any(reference, granites())


def test_granite_generates_the_same_64_tokens(reference, tmp_path):
    right = prove(reference, tmp_path, granite_config(), seed=1, tokens=64)
    block = right.decoder.pattern[0]
    for wrong in (
        replace(right.decoder, embed_scale=1.0),
        replace(right.decoder, logits=Logits()),
        replace(right.decoder, pattern=(replace(block, branch_scale=1.0),)),
        replace(right.decoder, pattern=(replace(block, mixer=replace(block.mixer, scale=None)),)),
    ):
        assert moves(right.decoder, wrong, right.params)


def minicpm_config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "initializer_range": 0.1,
    }  # fmt: skip
    return {"model_type": "minicpm", **sizes, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 7, **changes}


@st.composite
def minicpms(draw):
    heads, kv_heads, width = draw(st.sampled_from([(3, 3, 24), (4, 2, 32)]))
    return minicpm_config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=width,
        num_hidden_layers=draw(st.integers(1, 3)),
        scale_depth=draw(st.sampled_from([1.4, 1])),
        dim_model_base=draw(st.sampled_from([7, 16])),
        rope_theta=draw(st.sampled_from([1e4, 1e3])),
    )


def test_any_minicpm(reference):
    prove_any_paper(reference, "minicpm", minicpms())


def test_a_minicpm_is_exported_as_granite(reference, tmp_path):
    """The same bytes under the same keys, another config.json; stock transformers computes what the paper says."""
    imported = prove_paper(
        reference, tmp_path, "minicpm", minicpm_config(scale_emb=0.5, scale_depth=4), seed=2, tokens=64
    )
    assert family_of(imported.decoder).name == "Granite"
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", imported.decoder, imported.params)
    x, mask = padded(imported.decoder, rows=2, length=24)
    stock, report = reference.logits(tmp_path / "ours", x, mask)
    assert not any(report.values())
    paper, _ = reference.paper_logits("minicpm", tmp_path / "theirs", x, mask)
    assert_close(stock["logits"], paper, mask)
    again = import_hf(tmp_path / "ours")
    assert again.decoder == imported.decoder
    np.testing.assert_array_equal(again.params["layers"]["attn"]["q"], imported.params["layers"]["attn"]["q"])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "granite"


COUNTS = {  # MiniCPM: without the table, from the paper's table 2; Granite: of the files on the hub
    granite.minicpm_1b: (nonembedding_count, 1_247_442_432),
    granite.minicpm_2b: (nonembedding_count, 2_442_057_984),
    granite.granite_3_1_2b: (parameter_count, 2_533_531_648),
    granite.granite_3_1_8b: (parameter_count, 8_170_848_256),
}


@pytest.mark.fast
@pytest.mark.parametrize("size", COUNTS, ids=lambda f: f.__name__)
def test_published_counts(size):
    count, published = COUNTS[size]
    assert count(size()) == published
    assert f"{parameter_count(size()):,} parameters" in size.__doc__
    assert family_of(size()).name == "Granite"


@pytest.mark.fast
def test_neutral_factors_are_a_llama():
    config = granite_config(
        embedding_multiplier=1.0, attention_multiplier=8**-0.5, residual_multiplier=1.0, logits_scaling=1.0
    )
    assert family_of(granite.from_config(config)) is llama.FAMILY


@pytest.mark.fast
def test_published_minicpm_config_is_the_published_size():
    config = minicpm_config(
        hidden_size=2304, intermediate_size=5760, num_hidden_layers=40, num_attention_heads=36,
        num_key_value_heads=36, vocab_size=122753, dim_model_base=256, max_position_embeddings=4096,
    )  # fmt: skip
    assert replace(granite.from_minicpm_config(config), initial=granite.minicpm_2b().initial) == granite.minicpm_2b()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("read", "changes", "names"),
    [
        (granite.from_config, {"logits_scaling": 0}, "logits_scaling = 0"),
        (granite.from_config, {"residual_multiplier": "big"}, "residual_multiplier = 'big'"),
        (granite.from_config, {"rope_theta": 1e3, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
        (granite.from_config, {"position_embedding_type": "nope"}, "position_embedding_type"),
        (granite.from_minicpm_config, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        (granite.from_minicpm_config, {"dim_model_base": 0}, "dim_model_base = 0"),
        (granite.from_minicpm_config, {"num_experts": 8}, "num_experts"),
    ],
)
def test_what_cannot_be_read_is_named(read, changes, names):
    with pytest.raises(UserError, match=names):
        read({**(granite_config() if read is granite.from_config else minicpm_config()), **changes})


@pytest.mark.fast
def test_keys_of_versions_4_and_5_mean_the_same():
    old = granite_config(rope_theta=5e6, rope_scaling=None)
    assert granite.from_config(old) == granite.from_config(granite_config(rope_parameters={"rope_theta": 5e6}))


@pytest.mark.fast
def test_a_layer_of_two_kinds_is_no_granite():
    one = granite.from_config(granite_config())
    two = replace(one, pattern=(*one.pattern, replace(one.pattern[0], branch_scale=0.5)))
    assert granite.to_config(two) is None
