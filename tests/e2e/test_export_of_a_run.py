"""`slmjax export` and `slmjax import` on a run: the folder, its card, the ledger, the way back, mistakes."""

import json
import re

import numpy as np
import pytest
from running import slmjax

from slmjax.runs.loading import load
from slmjax.track.jsonl import read
from slmjax.tree import flatten


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory, reference):
    """The run exported, with stock transformers' say."""
    out = tmp_path_factory.mktemp("exports") / "tiny"
    done = slmjax(
        "export", tiny_run, "--format", "hf", "--out", out, "--reference-python", reference.python, "--licence", "mit"
    )
    assert done.code == 0, done.err
    assert done.out.count("  ok  ") == 7
    assert str(out) in done.out
    return out


def test_the_card_tells_what_the_run_wrote_down(tiny_run, exported):
    card = (exported / "README.md").read_text()
    config = json.loads((tiny_run / "config.json").read_text())
    for said in (
        "# tiny", "Llama language model, trained from scratch", 'license: "mit"', "Steps: 12", "Tokens: 3,072",
        "| Moby-Dick | public domain |", "FLOPs: ", config["fingerprint"], "| loss (nats a token) | ", "after step 12",
    ):  # fmt: skip
        assert said in card, said
    last = read(tiny_run / "metrics.jsonl")[-1]
    figures = f"{last['validation/loss']:.4f} | {last['validation/loss_se']:.4f}"
    assert re.search(r"\| [\w-]+ \| [\d,]+ \| 100% \|", card)
    assert f"| loss (nats a token) | {figures} | validation split, after step 12 |" in card
    assert "/" + "tmp" not in card


def test_the_ledger_has_the_export(tiny_run, exported):
    last = json.loads((tiny_run / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["path"], last["step"]) == ("exported", str(exported), 12)


def test_stock_tokenizer_and_model_are_those_of_the_run(tiny_run, exported, reference):
    run = load(tiny_run)
    text = "Call me Ishmael."
    assert reference.tokenize(exported, [text])["ids"] == [run.tokenizer().encode(text, bos=True)]


def test_import_brings_back_the_same_bits(tiny_run, exported, tmp_path):
    done = slmjax("import", exported, "--out", tmp_path / "back")
    assert done.code == 0, done.err
    run, hf, back = load(tiny_run), load(exported), load(tmp_path / "back")
    assert hf.decoder == back.decoder == run.decoder
    wanted = flatten(run.params)
    for model in (hf, back):
        for path, x in flatten(model.params).items():
            assert np.asarray(x).tobytes() == np.asarray(wanted[path]).tobytes(), path
    assert back.tokenizer().fingerprint == run.tokenizer().fingerprint
    again = slmjax("import", exported, "--out", tmp_path / "back")
    assert again.code == 2
    assert again.err.strip() == (f"slmjax: error: --out {tmp_path / 'back'} is not empty; choose another folder")
    onward = slmjax("export", tmp_path / "back", "--out", tmp_path / "hf", "--dtype", "bfloat16")
    assert onward.code == 0, onward.err
    assert "- Weights from: tiny" in (tmp_path / "hf" / "README.md").read_text()


def test_mistakes_are_one_line_and_change_nothing(tiny_run, exported, tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in exported.iterdir()}
    mistakes = {
        ("export", tiny_run, "--out", exported): "not empty; choose another folder or add --overwrite",
        ("export", tmp_path / "nowhere", "--out", tmp_path / "x"): "no such folder",
        ("export", tiny_run, "--out", tmp_path / "x", "--step", "5"): "no checkpoint of step 5; there are: 4, 8, 12",
        ("export", tiny_run, "--out", tmp_path / "x", "--dtype", "float8"): "float8",
        ("import", tmp_path / "nowhere", "--out", tmp_path / "x"): "no such folder",
        ("import", tiny_run, "--out", tmp_path / "x"): "a folder of slmjax already",
    }
    for argv, message in mistakes.items():
        done = slmjax(*argv)
        assert done.code in (2, 5), argv
        assert message in done.err, argv
        assert len(done.err.strip().splitlines()) == 1
    assert {p.name: p.stat().st_mtime_ns for p in exported.iterdir()} == before
    assert list(tmp_path.iterdir()) == []
