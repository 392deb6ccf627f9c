"""Scalars folded into the weights: the same logits, in a class that transformers has, and what is refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from contract.shapes import padded
from families.proof import NOTHING, assert_close, logits
from models.tiny import parameters

from slmjax.convert import gate
from slmjax.convert.export import export_hf
from slmjax.convert.expressed import expressed
from slmjax.convert.fold import FOLDS, Unfoldable, fold
from slmjax.convert.folder import MARK, Rejected
from slmjax.convert.hf import import_hf, write_hf
from slmjax.errors import UserError
from slmjax.models.decoder import Stage
from slmjax.models.families import gpt2, llama, opt
from slmjax.models.families.cerebras_gpt import cerebras_gpt_mup
from slmjax.nn.attention import QKNorm
from slmjax.nn.block import NormedStream, Parallel, PostNorm, Sandwich
from slmjax.nn.embedding import Logits
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.position import Alibi

SIZES = {"layers": 1, "width": 32, "heads": 4, "vocab": 97, "context": 64}
LLAMA = llama.llama(**SIZES, kv_heads=2, hidden=48)
MUP = cerebras_gpt_mup(**SIZES, base_width=8, embed_multiplier=3.0, output_multiplier=1.5)


def perturbed(decoder):
    return parameters(decoder, decoder.build(), scale=0.4)


def changed(decoder, block=None, **fields):
    """Fields of the decoder, and of its block's parts: {"mixer": {"scale": 0.2}, "branch_scale": 0.3}."""
    (only,) = decoder.pattern
    parts = {}
    for name, value in (block or {}).items():
        parts[name] = replace(getattr(only, name), **value) if isinstance(value, dict) else value
    return replace(decoder, pattern=(replace(only, **parts),), **fields)


def granite(decoder, **block):
    """Four scalars, as Granite and MiniCPM have them."""
    scalars = {"branch_scale": 0.4, "mixer": {"scale": 0.11}}
    return changed(decoder, {**scalars, **block}, embed_scale=12.0, logits=Logits(scale=1 / 9))


def wired(decoder, kind, **fields):
    (only,) = decoder.pattern
    return replace(decoder, pattern=(kind(mixer=only.mixer, mlp=only.mlp, norm=only.norm, **fields),))


PLAIN = {
    "granite, tied": (granite(LLAMA), LLAMA),
    "granite, untied": (granite(replace(LLAMA, tied=False)), replace(LLAMA, tied=False)),
    "granite, biases": tuple(
        f(llama.llama(**SIZES, kv_heads=2, hidden=48, attention_bias=True, mlp_bias=True))
        for f in (granite, lambda d: d)
    ),
    "muP": (MUP, gpt2.gpt2(**SIZES, activation=MUP.pattern[0].mlp.activation)),
    "muP, branches too": (
        changed(MUP, {"branch_scale": 0.25}),
        gpt2.gpt2(**SIZES, activation=MUP.pattern[0].mlp.activation),
    ),
    "gain from 1": tuple(replace(f(LLAMA), final_norm=RMSNorm(offset=1.0)) for f in (granite, lambda d: d)),
    "soft caps": tuple(
        changed(d, {"mixer": {"softcap": 2.0}}, logits=Logits(scale=d.logits.scale, softcap=1.5))
        for d in (granite(LLAMA), LLAMA)
    ),
    "alibi": tuple(changed(d, {"mixer": {"position": Alibi()}}) for d in (granite(LLAMA), LLAMA)),
    "narrow table": tuple(replace(d, table_width=12, final_norm=None) for d in (granite(LLAMA), LLAMA)),
    "parallel": tuple(wired(d, Parallel, branch_scale=s) for d, s in ((LLAMA, 0.3), (LLAMA, 1.0))),
    "norm of the stream": tuple(wired(d, NormedStream, branch_scale=s) for d, s in ((LLAMA, 0.3), (LLAMA, 1.0))),
    "norm after the sum": tuple(wired(d, PostNorm, branch_scale=s) for d, s in ((LLAMA, 0.3), (LLAMA, 1.0))),
    "stages": tuple(
        replace(d, pattern=d.pattern * 2, tail=(Stage(pattern=d.pattern),), repeats=1) for d in (granite(LLAMA), LLAMA)
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_folded_model_computes_the_same_without_scalars(name):
    scaled, plain = PLAIN[name]
    folded = fold(scaled)
    assert folded.decoder == plain
    params = perturbed(scaled)
    x, mask = padded(scaled, rows=2, length=24)
    wanted = logits(scaled, params, x, mask)
    assert np.abs(wanted).max() > 0.05
    found = logits(plain, folded.apply(params), x, mask)
    assert np.abs(found - wanted)[mask == 1].max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    assert folded.steps
    assert all(step.factor != 1.0 for step in folded.steps)


@pytest.mark.parametrize("one", FOLDS, ids=lambda f: f.__name__)
def test_each_scalar_alone(one):
    decoder = changed(MUP, {"branch_scale": 0.25})
    folded = fold(decoder, [one])
    assert len(folded.scalars) == 1
    assert fold(folded.decoder, [one]).decoder == folded.decoder
    params = perturbed(decoder)
    x, mask = padded(decoder, rows=2, length=24)
    wanted = logits(decoder, params, x, mask)
    found = logits(folded.decoder, folded.apply(params), x, mask)
    assert np.abs(found - wanted)[mask == 1].max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def test_what_has_no_scalars_is_left_alone():
    params = perturbed(LLAMA)
    folded = fold(LLAMA)
    assert (folded.decoder, folded.steps, folded.scalars) == (LLAMA, (), ())
    assert all(a is b for a, b in zip(jax.tree.leaves(folded.apply(params)), jax.tree.leaves(params), strict=True))
    usual = changed(LLAMA, {"mixer": {"scale": 8**-0.5}})  # said aloud, what None means
    assert (fold(usual).decoder, fold(usual).scalars) == (LLAMA, ())


def test_stock_transformers_computes_a_folded_granite(tmp_path, reference):
    decoder = granite(LLAMA)
    params = perturbed(decoder)
    folded = fold(decoder)
    write_hf(tmp_path, folded.decoder, folded.apply(params))
    x, mask = padded(decoder, rows=2, length=24)
    theirs, report = reference.logits(tmp_path, x, mask)
    assert report == NOTHING
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert_close(logits(decoder, params, x, mask), theirs["logits"], mask, least=0.05)


SCALARS = ("embed_scale = 3", "position.scale = 3", "mixer.scale = 0.125", "logits.scale = 0.375")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_folds_and_says_so(tmp_path, reference, dtype):
    out = tmp_path / "hf"
    made = export_hf(MUP, perturbed(MUP), out, dtype=dtype, reference_python=reference.python)
    assert made.folded == SCALARS
    assert [check.passed for check in made.checks] == [True] * 6
    assert made.checks[0].name.startswith("fold: logits")
    record = json.loads((out / MARK).read_text())
    assert record["folded"] == list(SCALARS)
    assert record["checks"][0]["passed"]
    card = (out / "README.md").read_text()
    assert f"Scalars folded into the weights: {', '.join(SCALARS)}." in card
    assert import_hf(out).decoder == fold(MUP).decoder


def test_a_wrong_fold_is_caught(tmp_path, monkeypatch):
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)
    from slmjax.convert import export

    def wrong(decoder, numerics):
        found = expressed(decoder, numerics)
        steps = found.folded.steps
        return found._replace(folded=replace(found.folded, steps=(steps[0]._replace(factor=3.01), *steps[1:])))

    monkeypatch.setattr(export, "expressed", wrong)
    with pytest.raises(Rejected, match="the export failed its check: fold: logits"):
        export_hf(MUP, perturbed(MUP), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf.failed"]


def test_as_few_scalars_as_possible_are_folded():
    """GPT-2 has a field for unscaled scores, so that one stays."""
    decoder = changed(MUP, {"mixer": {"scale": 1.0}})
    found = expressed(decoder)
    assert found.family.name == "GPT-2"
    assert found.folded.decoder.pattern[0].mixer.scale == 1.0
    assert len(found.folded.scalars) == 3


NORM = QKNorm(norm=RMSNorm())
REFUSED = {
    "queries under a norm": (
        granite(LLAMA, mixer={"scale": 0.3, "qk_norm": NORM}),
        "mixer.scale = 0.3: a norm follows",
    ),
    "branches under norms": (wired(LLAMA, Sandwich, branch_scale=0.3), "branch_scale = 0.3: a norm .* of Sandwich"),
    "tied, no final norm": (replace(granite(LLAMA), final_norm=None), "embed_scale: the table is tied"),
    "tied, a norm without gain": (
        replace(LLAMA, logits=Logits(scale=0.5), final_norm=LayerNorm(gain=False, bias=False)),
        "logits.scale: the table is tied",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_weight_can_take_is_refused(name):
    decoder, words = REFUSED[name]
    with pytest.raises(Unfoldable, match=words) as error:
        fold(decoder)
    assert "\n" not in str(error.value)


BARE = LayerNorm(gain=False, bias=False)
NAMED = {
    "table_width = 12": replace(LLAMA, table_width=12),
    "embed_norm = RMSNorm": replace(LLAMA, embed_norm=RMSNorm()),
    "block = PostNorm": wired(LLAMA, PostNorm),
    "mixer.kv_heads = 2": changed(gpt2.gpt2(**SIZES), {"mixer": {"kv_heads": 2}}),
    "mixer.position = Alibi": changed(opt.opt(**SIZES), {"mixer": {"position": Alibi()}}),
    "norm = LayerNorm": changed(LLAMA, {"norm": BARE}, final_norm=BARE),
    "layers = 2 kinds of block": replace(
        LLAMA, pattern=(LLAMA.pattern[0], replace(LLAMA.pattern[0], norm=RMSNorm(eps=0.1)))
    ),
}


@pytest.mark.parametrize("words", NAMED)
def test_the_value_in_the_way_is_named(words):
    with pytest.raises(UserError, match="no class of transformers has ") as error:
        expressed(NAMED[words])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_two_values_in_the_way_are_not_told_apart():
    decoder = wired(replace(LLAMA, table_width=12), PostNorm)
    with pytest.raises(UserError, match="computes exactly what this model does; known are: Llama, GPT-2"):
        expressed(decoder)
