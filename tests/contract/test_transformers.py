"""Ours against stock transformers, in both directions: logits, greedy tokens, key sets, round trips.

The reference runs in its own Python and answers through files; see tests/reference.
"""

import pytest
from contract.shapes import CONFIGS, DECODERS, changed, padded, perturbed
from families.proof import NOTHING, assert_close, logits, moves, same_greedy, same_tensors

from slmjax.convert.hf import family_of, import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.convert.table import to_theirs
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.nn.mlp import gelu, gelu_tanh, relu
from slmjax.nn.position import Rope
from slmjax.tree import flatten


@pytest.mark.parametrize("name", DECODERS)
def test_what_we_export_stock_transformers_computes(tmp_path, reference, name):
    decoder = DECODERS[name]
    params = perturbed(decoder)
    write_hf(tmp_path, decoder, params)
    tokens, mask = padded(decoder)
    theirs, report = reference.logits(tmp_path, tokens, mask)
    assert report == NOTHING
    assert_close(logits(decoder, params, tokens, mask), theirs["logits"], mask, least=3)

    shapes = {key: x.shape for key, x in Tensors(tmp_path).items()}
    assert shapes == reference.saved_keys(tmp_path)

    back = import_hf(tmp_path)
    assert back.decoder == decoder
    same_tensors(flatten(back.params), flatten(params))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stock_transformers_saves_we_compute(tmp_path, reference, name):
    reference.make(tmp_path / "theirs", CONFIGS[name], seed=1)
    imported = import_hf(tmp_path / "theirs")
    tokens, mask = padded(imported.decoder)
    theirs, _ = reference.logits(tmp_path / "theirs", tokens, mask)
    assert_close(logits(imported.decoder, imported.params, tokens, mask), theirs["logits"], mask, least=3)

    written = dict(to_theirs(imported.family.rows(imported.decoder), imported.params))
    same_tensors(written, Tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read_exactly(tmp_path, reference, dtype):
    reference.make(tmp_path, CONFIGS["llama"], seed=2, dtype=dtype)
    imported = import_hf(tmp_path)
    tokens, mask = padded(imported.decoder, length=32)
    theirs, _ = reference.logits(tmp_path, tokens, mask)
    assert_close(logits(imported.decoder, imported.params, tokens, mask), theirs["logits"], mask, least=3)


@pytest.mark.parametrize(
    "name",
    ["llama, grouped-query, tied", "llama, multi-head, untied", "gpt2, tied", "gpt2, erf gelu, unscaled attention"],
)
def test_64_greedy_tokens_are_identical(tmp_path, reference, name):
    decoder = DECODERS[name]
    params = perturbed(decoder, seed=3)
    write_hf(tmp_path, decoder, params)
    same_greedy(reference, tmp_path, import_hf(tmp_path), 64, seed=2, prompt=12)


BASE_LLAMA = llama(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=97, context=64)
BASE_GPT2 = gpt2(layers=2, width=32, heads=4, vocab=97, context=64)
SWITCHES = {
    "llama theta": (BASE_LLAMA, changed(BASE_LLAMA, mixer={"position": Rope(theta=5e4)})),
    "llama eps": (BASE_LLAMA, changed(BASE_LLAMA, norm={"eps": 1e-2})),
    "llama activation": (BASE_LLAMA, changed(BASE_LLAMA, mlp={"activation": gelu})),
    "gpt2 tanh or erf gelu": (BASE_GPT2, changed(BASE_GPT2, mlp={"activation": gelu})),
    "gpt2 relu": (BASE_GPT2, changed(BASE_GPT2, mlp={"activation": relu})),
    "gpt2 eps": (BASE_GPT2, changed(BASE_GPT2, norm={"eps": 1e-2})),
    "gpt2 scale": (BASE_GPT2, changed(BASE_GPT2, mixer={"scale": 1.0})),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_one_wrong_switch_would_be_seen(name):
    """Else parity would not prove that the switch is right."""
    right, wrong = SWITCHES[name]
    assert moves(right, wrong, perturbed(right), length=right.context)


def test_the_families_are_told_apart_by_what_they_compute():
    assert family_of(BASE_LLAMA).model_type == "llama"
    assert family_of(BASE_GPT2).model_type == "gpt2"
    assert family_of(changed(BASE_GPT2, mlp={"activation": gelu_tanh})).model_type == "gpt2"
