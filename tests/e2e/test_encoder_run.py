"""A masked language model from text to a folder that stock BertForMaskedLM loads: train, resume, evaluate, export."""

import json
import shutil

import numpy as np
import pytest
from running import slmjax

from slmjax.cli.verify import CLOCK
from slmjax.track.jsonl import read

EXPERIMENT = """
from slmjax.config import Evaluation, Experiment
from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import {tokenizer}
from slmjax.models.families.bert import bert
from slmjax.objectives import MaskedLM
from slmjax.optim.schedules import Cosine

TEXT = JSONL(name="Moby-Dick", path="{text}", licence="public domain")
RECIPE = Recipe(name="moby_{tokenizer}", sources=(TEXT,), tokenizer={tokenizer}(vocab=384), validation=0.1)


def experiment() -> Experiment:
    return Experiment(
        name="masked",
        model=bert(layers=2, width=32, heads=2, hidden=64, vocab=384, context=64),
        data=PackedText(train=(Part(source=RECIPE),), length=32, batch=8),
        objective=MaskedLM(),
        schedule=Cosine(peak_lr=1e-2, warmup_steps=2),
        steps=10,
        evaluation=Evaluation(every=5, batches=2),
    )
"""


def runtime(folder, data_dir):
    return ["--runtime.workdir", folder, "--runtime.data-dir", data_dir, "--runtime.tracking.wandb", "disabled"]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(experiment file, run folder, data folder) of a finished run."""
    folder = tmp_path_factory.mktemp("masked")
    file = folder / "masked_experiment.py"
    file.write_text(EXPERIMENT.format(text=tiny.text, tokenizer="MaskedBPE"))
    done = slmjax("train", file, *runtime(folder / "run", folder / "data"), "--runtime.checkpoints.every", "5")
    assert done.code == 0, done.err
    assert "slmjax embed" in done.out
    return file, folder / "run", folder / "data"


def test_it_learns_and_counts_hidden_tokens(made):
    rows = read(made[1] / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    assert train[-1]["loss"] < train[0]["loss"] - 0.3
    assert all(0.10 * 256 < row["weight"] < 0.16 * 256 for row in train)
    assert [row["step"] for row in rows if "validation/loss" in row] == [5, 10]


def test_it_resumes_bit_for_bit(made, tmp_path):
    """Stopped after step 5 and continued: the same tokens are hidden, the same losses come out."""
    file, whole, data = made
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "10")
    done = slmjax("train", file, *runtime(part, data), "--runtime.checkpoints.every", "5")
    assert done.code == 0, done.err
    one, two = (
        [{k: repr(v) for k, v in row.items() if k not in CLOCK} for row in read(folder / "metrics.jsonl")]
        for folder in (whole, part)
    )
    assert len(one) == 10
    assert one == two


def test_eval_doctor_inspect_and_embed_know_it(made, tmp_path):
    file, run, _ = made
    done = slmjax("eval", run, "--json", "--batches", "2")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert 0 < found["loss"] < 6.5
    assert found["bytes"] == 0
    assert "bits_per_byte" not in found
    doctor = slmjax("doctor", file, "--runtime.mesh.data", "8")
    assert doctor.code == 0, doctor.err
    inspected = slmjax("inspect", run)
    assert "head/transform" in inspected.out
    assert "slmjax embed" in inspected.out
    embedded = slmjax("embed", run, "--text", "Call me Ishmael.")
    assert np.isclose(np.linalg.norm(json.loads(embedded.out)), 1, atol=1e-5)
    generated = slmjax("generate", run, "--prompt", "a")
    assert generated.code == 2
    assert "is an encoder" in generated.err


def test_its_export_is_a_stock_bert(made, tmp_path, reference):
    """The gate included: same logits, same tokenizer; and the mask token has its name."""
    out = tmp_path / "hf"
    done = slmjax("export", made[1], "--out", out, "--reference-python", reference.python)
    assert done.code == 0, done.err
    assert "BertForMaskedLM loads it" in done.out
    assert "greedy" not in done.out
    assert done.out.count("  ok  ") == 5
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert not (out / "generation_config.json").exists()
    names = json.loads((out / "tokenizer_config.json").read_text())
    assert (names["mask_token"], names["cls_token"], names["sep_token"]) == ("<|mask|>", "<|bos|>", "<|eos|>")
    assert names["padding_side"] == "right"
    told = reference.tokenize(out, ["Call me Ishmael."])
    assert told["ids"][0][0] == told["bos"]
    assert told["ids"][0][-1] == told["eos"]
    again = slmjax("import", out, "--out", tmp_path / "imported")
    assert again.code == 0, again.err
    assert "slmjax embed" in again.out
    twice = slmjax("export", tmp_path / "imported", "--out", tmp_path / "again")
    assert twice.code == 0, twice.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_tokenizer_without_a_mask_is_named_before_the_first_step(tiny, tmp_path):
    file = tmp_path / "maskless_experiment.py"
    file.write_text(EXPERIMENT.format(text=tiny.text, tokenizer="BPE"))
    done = slmjax("train", file, *runtime(tmp_path / "run", tmp_path / "data"))
    assert done.code == 2
    assert "has no mask token" in done.err.strip().splitlines()[-1]
    assert read(tmp_path / "run" / "metrics.jsonl") == []
