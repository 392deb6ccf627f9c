"""`slmjax eval` on a run and on its export."""

import json
import shutil

import pytest
from running import slmjax

from slmjax.convert.hf import write_hf
from slmjax.runs.loading import load


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    run = load(tiny_run)
    write_hf(folder, run.decoder, run.params, tokenizer=run.tokenizer())
    return folder


def store_of(tiny):
    return next(p.parent for p in tiny.data_dir.rglob("manifest.json"))


def test_a_run_is_evaluated_on_its_own_validation_data(tiny_run):
    done = slmjax("eval", tiny_run, "--json", "--dtype", "float32")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["step"] == 12
    assert 3 < found["loss"] < 6
    assert 0 < found["loss_se"] < 0.2
    assert found["bits_per_byte"] > 1
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    trained = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
    # training looked at 16 sequences of the split
    assert abs(found["loss"] - trained) < 0.3


def test_an_export_scores_as_the_run_does(tiny, tiny_run, exported):
    same = ["--json", "--data", store_of(tiny), "--length", "32", "--dtype", "float32", "--batches", "3"]
    a, b = (json.loads(slmjax("eval", model, *same).out) for model in (tiny_run, exported))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert a["tokens"] == b["tokens"] > 100
    table = slmjax("eval", tiny_run, "--batches", "1")
    assert "bits per byte" in table.out
    assert "slmjax generate" in table.out


def test_mistakes_are_named(tiny, tiny_run, exported, tmp_path):
    store = store_of(tiny)
    for argv, message in (
        ((exported,), "add --data with a token store"),
        ((tiny_run, "--length", "65"), "--length is 65, longer than the model's context 64"),
        ((tiny_run, "--data", tmp_path), "no token store there"),
        ((tiny_run, "--batches", "0"), "expected at least 1"),
    ):
        done = slmjax("eval", *argv)
        assert done.code in (2, 4)
        assert message in done.err
        assert done.err.count("\n") == 1
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    done = slmjax("eval", other, "--data", store)
    assert done.code == 4
    assert "written by another tokenizer" in done.err


@pytest.mark.fast
def test_help_shows_an_example():
    done = slmjax("eval", "--help")
    assert done.code == 0
    assert "slmjax eval runs/quickstart" in done.out
