"""The model card says what is known, and nothing else."""

import re

import pytest

from slmjax.convert.card import Energy, Facts, Mixed, Result, Source, render

pytestmark = pytest.mark.fast

FULL = Facts(
    name="Small",
    family="Llama",
    parameters=134_515_008,
    context=2048,
    vocab=49152,
    dtype="bfloat16",
    licence="apache-2.0",
    language=("en", "no"),
    sources=(
        Source(
            name="Moby-Dick | the whale",
            licence="public domain",
            url="https://www.gutenberg.org/ebooks/2701",
        ),
        Source(name="Wiki", documents=12),
    ),
    mixture=(Mixed(name="whales", tokens=300_000, share=2 / 3), Mixed(name="wiki", tokens=12, share=1 / 3)),
    tokens=3_000_000,
    steps=400,
    flops=2.5e15,
    flops_convention="6N",
    energy=Energy(kwh=0.0123, method="tdp-estimate", co2e_kg=0.005, grid="475 g/kWh, world 2019"),
    hardware="1 x cpu",
    results=(
        Result(metric="loss", value=3.25, standard_error=0.0125, data="validation"),
        Result(metric="bits per byte", value=1.2),
    ),
    fingerprint="f" * 64,
    data_fingerprints=("d" * 64,),
    commit="c" * 40,
    changed=True,
    version="0.1.0",
)


def test_everything_known_is_said():
    card = render(FULL)
    for said in (
        'license: "apache-2.0"', '- "no"', "trained from scratch with slmjax", "134,515,008", "2,048 tokens",
        "[Moby-Dick \\| the whale](https://www.gutenberg.org/ebooks/2701) | public domain |  |",
        "| Wiki |  | 12 |", "| whales | 300,000 | 66.7% |", "| wiki | 12 | 33.3% |",
        "Tokens: 3,000,000", "Steps: 400", "FLOPs: 2.50e+15 (6N)",
        "0.0123 kWh (an estimate, method: tdp-estimate), 0.005 kg CO2e (475 g/kWh, world 2019)",
        "| loss | 3.2500 | 0.0125 | validation |", "| bits per byte | 1.2000 |  |  |", "f" * 64, "d" * 64,
        f"commit `{'c' * 40}` with local changes", "AutoTokenizer.from_pretrained",
    ):  # fmt: skip
        assert said in card, said
    assert not re.search(r"None|\{\{|\{%", card)


def test_nothing_unknown_is_made_up():
    card = render(Facts(name="Small", tokenizer=False))
    for absent in (
        "Data",
        "Training",
        "Evaluation",
        "Licence",
        "Lineage",
        "license",
        "kWh",
        "None",
        "Tokenizer",
        "scratch",
    ):
        assert absent not in card, absent
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_the_header_is_yaml_that_text_cannot_break_out_of():
    card = render(Facts(name="x\n---\n# evil", licence='mit"\nevil: true'))
    header = card.split("---\n")[1]
    assert 'license: "mit\\" evil: true"' in header
    assert "\n# evil" not in card
