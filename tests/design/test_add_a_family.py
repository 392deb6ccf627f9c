"""A new family is one file of less than 100 lines, proved against stock transformers. docs/add_a_family.md shows it."""

from dataclasses import replace

import pytest
from design import starcoder2
from families.proof import moves, prove, prove_any
from hypothesis import strategies as st
from running import ROOT

from slmjax.convert import expressed, hf
from slmjax.errors import UserError
from slmjax.models.families import FAMILIES
from slmjax.models.flops import parameter_count
from slmjax.nn.norm import RMSNorm

FILE = ROOT / "tests" / "design" / "starcoder2.py"


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """The line that models/families/__init__.py would get."""
    for module in (expressed, hf):
        monkeypatch.setattr(module, "FAMILIES", (*FAMILIES, starcoder2.FAMILY))


def config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128, "sliding_window": 7,
    }  # fmt: skip
    return {"model_type": "starcoder2", **sizes, **changes}


@st.composite
def configs(draw):
    heads, kv_heads, width = draw(st.sampled_from([(3, 1, 24), (4, 2, 32)]))
    return config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=width,
        use_bias=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 7])),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e6]))},
    )


@pytest.mark.fast
def test_the_page_shows_a_file_of_less_than_100_lines_that_slmjax_knows_nothing_of():
    text = FILE.read_text()
    assert len(text.splitlines()) < 100
    assert f"```python\n{text}```" in (ROOT / "docs" / "add_a_family.md").read_text(), "the page is out of step"
    assert not [p for p in (ROOT / "slmjax").rglob("*.py") if "starcoder2" in p.read_text().lower()]


def test_any_starcoder2(reference):
    prove_any(reference, configs())


def test_the_same_64_tokens_and_every_switch_matters(reference, tmp_path):
    right = prove(reference, tmp_path, config(tie_word_embeddings=False), seed=1, tokens=64)
    d = right.decoder
    (block,) = d.pattern
    for changed in (
        replace(block, mixer=replace(block.mixer, window=None)),
        replace(block, mixer=replace(block.mixer, position=replace(block.mixer.position, theta=50.0))),
        replace(block, norm=RMSNorm()),
    ):
        assert moves(d, replace(d, pattern=(changed,)), right.params)


@pytest.mark.fast
def test_published_count():
    assert parameter_count(starcoder2.starcoder2_3b()) == 3_030_371_328
    assert hf.family_of(starcoder2.starcoder2_3b()) is starcoder2.FAMILY


@pytest.mark.fast
def test_what_it_does_not_know_is_named():
    with pytest.raises(UserError, match="num_experts"):
        starcoder2.from_config(config(num_experts=4))
