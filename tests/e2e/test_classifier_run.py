"""Labelled texts to a classifier that stock transformers loads: train, resume, evaluate, export, for both kinds."""

import csv
import json
import shutil

import numpy as np
import pytest
from running import slmjax

from slmjax.cli.verify import CLOCK
from slmjax.track.jsonl import read

EXPERIMENT = """
from dataclasses import replace

from slmjax.config import Evaluation, Experiment
from slmjax.data.labelled import LabelledText
from slmjax.data.tokenizer import BPE
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.heads import Classifier, LastTokenScore
from slmjax.objectives import Classify
from slmjax.optim.schedules import Cosine

LABELS = ("dull", "fine")
ENCODER = bert(layers=1, width=32, heads=2, hidden=48, vocab=300, context=32, head=Classifier(labels=LABELS))
DECODER = replace(
    llama(layers=1, width=32, heads=2, kv_heads=1, hidden=48, vocab=300, context=32),
    head=LastTokenScore(labels=LABELS),
)


def experiment() -> Experiment:
    return Experiment(
        name="labels",
        model={model},
        data=LabelledText(
            train=("{file}",), tokenizer=BPE(vocab=300), length=24, batch=16, held_out=0.3, closed={closed},
            licence="CC0-1.0",
        ),
        objective=Classify(),
        schedule=Cosine(peak_lr=2e-2, warmup_steps=4),
        steps=40,
        evaluation=Evaluation(every=20, batches=4),
    )
"""


def runtime(folder, data_dir):
    return ["--runtime.workdir", folder, "--runtime.data-dir", data_dir, "--runtime.tracking.wandb", "disabled"]


@pytest.fixture(scope="module", params=["ENCODER", "DECODER"])
def made(request, tmp_path_factory):
    """(experiment file, run folder, data folder, texts) of a finished run: one word decides the label."""
    folder = tmp_path_factory.mktemp(request.param.lower())
    rng = np.random.default_rng(0)
    words = ["the", "plot", "of", "this", "film", "and", "its", "actor", "was", "a", "long", "way"]
    with (folder / "films.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for i in range(200):
            told = rng.choice(words, rng.integers(2, 7)).tolist()
            told.insert(int(rng.integers(0, len(told))), "great" if i % 2 else "boring")
            table.writerow([" ".join([*told, str(i)]), "fine" if i % 2 else "dull"])
    source = folder / f"{request.param.lower()}_labels.py"
    closed = request.param == "ENCODER"
    source.write_text(EXPERIMENT.format(model=request.param, closed=closed, file=folder / "films.csv"))
    done = slmjax("train", source, *runtime(folder / "run", folder / "data"), "--runtime.checkpoints.every", "20")
    assert done.code == 0, done.err
    assert "texts to train on" in done.out + done.err
    return source, folder / "run", folder / "data", folder / "films.csv"


def test_it_learns_and_resumes_bit_for_bit(made, tmp_path):
    file, whole, data, _ = made
    rows = read(whole / "metrics.jsonl")
    assert rows[-1]["validation/accuracy"] > 0.9
    assert rows[-1]["validation/loss"] < rows[0]["loss"]
    assert all(row["weight"] == 16 for row in rows)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "40")
    done = slmjax("train", file, *runtime(part, data), "--runtime.checkpoints.every", "20")
    assert done.code == 0, done.err
    one, two = (
        [{k: repr(v) for k, v in row.items() if k not in CLOCK} for row in read(folder / "metrics.jsonl")]
        for folder in (whole, part)
    )
    assert len(one) == 40
    assert one == two


def test_eval_says_accuracy_and_generate_refuses(made):
    source, run, _, texts = made
    done = slmjax("eval", run, "--json", "--dtype", "float32")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"] <= 1
    assert 30 < found["texts"] < 90
    whole = slmjax("eval", run, "--data", texts, "--json", "--dtype", "float32")
    assert json.loads(whole.out)["texts"] == 200, whole.err
    table = slmjax("eval", run)
    assert "95%, Wilson" in table.out
    assert "labels: dull, fine" in table.out
    generated = slmjax("generate", run, "--prompt", "a")
    assert generated.code == 2
    assert "is a classifier (dull, fine)" in generated.err or "is an encoder" in generated.err
    assert generated.err.strip().count("\n") == 0
    if source.name.startswith("encoder"):
        return
    gguf = slmjax("export", run, "--format", "gguf", "--out", run / "x.gguf")
    assert gguf.code == 2
    assert "a GGUF file cannot hold a classifier" in gguf.err


def test_its_export_is_a_stock_classifier(made, tmp_path, reference):
    """The gate included: same logits, same labels, same tokenizer; and the export is evaluated as the run is."""
    _, run, _, texts = made
    out = tmp_path / "hf"
    done = slmjax("export", run, "--out", out, "--reference-python", reference.python)
    assert done.code == 0, done.err
    assert "ForSequenceClassification loads it" in done.out
    assert ": labels" in done.out
    assert done.out.count("  ok  ") == 6
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "dull", "1": "fine"}
    assert config["pad_token_id"] is not None
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "CC0-1.0" in card
    same = ["--data", texts, "--json", "--dtype", "float32", "--length", "24"]
    a, b = (json.loads(slmjax("eval", model, *same).out) for model in (run, out))
    assert (a["accuracy"], a["texts"]) == (b["accuracy"], b["texts"])
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
