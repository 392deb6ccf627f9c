"""Models rounded after training in stock transformers and llama.cpp: the loss on the same held-out text."""

import json
import re

import jax
import numpy as np
import pytest
from models.tiny import batch, logits, parameters, tiny_llama
from running import slmjax, store_of

from slmjax import tree
from slmjax.convert.gate_loss import check_loss, log_probabilities
from slmjax.runs.loading import load

LINE = re.compile(r"  ok   (.*): loss +([\d.]+) nats a token on (\d+) tokens, ([\d.]+) here: (\S+) ")


@pytest.mark.fast
def test_a_difference_of_losses_is_judged_by_its_mean_and_its_error():
    ours = [np.log(np.full(50, 0.5)), np.log(np.full(50, 0.25))]
    same = check_loss("x", ours, [row - 0.019 for row in ours])
    assert same.passed
    assert "on 100 tokens, 1.0397 here: +1.9e-02" in same.found
    assert check_loss("x", ours, [row - 0.021 for row in ours]).passed is False
    assert check_loss("x", ours, [row + 0.021 for row in ours]).passed is False
    noise = np.tile([0.5, -0.5], 25)  # mean 0
    assert check_loss("x", ours, [row + noise for row in ours]).passed
    missing = [np.where(np.arange(50) < 10, np.nan, row) for row in ours]
    assert "on 80 tokens" in check_loss("x", ours, missing).found
    assert check_loss("x", ours, [row * np.nan for row in ours]).passed is None


def rounded_and_exported(tiny, run, folder, reference, method, form):
    """The folder of codes, and what the gate says about the loss: runtime, theirs, tokens, ours, difference."""
    store, codes, out = store_of(tiny), folder / "codes", folder / f"model.{form}"
    done = slmjax("quantize", run, "--method", method, "--bits", 4, "--group", 32, "--batches", 2, "--out", codes)
    assert done.code == 0, done.err
    done = slmjax(
        "export", codes, "--format", form, "--out", out, "--data", store, "--reference-python", reference.python
    )
    assert done.code == 0, done.err
    name, theirs, tokens, ours, change = LINE.search(done.out).groups()
    assert float(theirs) - float(ours) == pytest.approx(float(change), abs=1.1e-4)
    return codes, name, float(ours), int(tokens), float(change)


def test_llama_cpp_has_the_loss_of_slmjax(tiny, tiny_run, tmp_path, reference):
    codes, name, ours, tokens, change = rounded_and_exported(tiny, tiny_run, tmp_path, reference, "gptq", "gguf")
    assert name.startswith("llama.cpp")
    assert tokens > 900
    assert abs(change) <= 0.005
    done = slmjax("eval", codes, "--data", store_of(tiny), "--batch", 1, "--json", "--dtype", "float32")
    assert ours == pytest.approx(json.loads(done.out)["loss"], abs=0.2)  # which is of more text


def test_transformers_has_the_loss_of_slmjax_after_awq(tiny, tiny_run, tmp_path, reference):
    codes, name, _, tokens, change = rounded_and_exported(tiny, tiny_run, tmp_path, reference, "awq", "hf")
    assert name.startswith("transformers")
    assert tokens > 900
    assert abs(change) <= 1e-5
    norms = ["layers/attn_norm/scale", "layers/mlp_norm/scale"]
    old, new = (tree.flatten(load(folder).params) for folder in (tiny_run, codes))
    assert any(np.abs(np.asarray(old[name]) - np.asarray(new[name])).max() > 1e-3 for name in norms)


@pytest.mark.fast
def test_log_probabilities_are_those_of_the_next_tokens():
    decoder = tiny_llama(layers=1)
    model = decoder.build()
    params, b = parameters(decoder, model), batch(rows=1)
    run = jax.jit(lambda params: logits(model, params, b), compiler_options={"xla_backend_optimization_level": 0})
    scores = np.asarray(run(params), np.float64)[0]
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    text = tuple(np.asarray(b.tokens[0]).tolist())
    found = log_probabilities(decoder, params, (text, text[:5]))
    for ids, row in zip((text, text[:5]), found, strict=True):
        np.testing.assert_allclose(row, scores[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
