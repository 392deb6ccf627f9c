"""What `slmjax train` leaves behind, and that it goes on from there."""

import json
import shutil

import pytest
import wandb_file
from running import runtime, slmjax

from slmjax.cli.verify import CLOCK
from slmjax.track.jsonl import read
from slmjax.track.ledger import state_of


def test_a_run_explains_itself(tiny_run, tiny):
    names = {p.name for p in tiny_run.iterdir()}
    assert names >= {
        "config.json", "environment.json", "git.diff", "experiment.py", "log.txt", "metrics.jsonl", "ledger.jsonl",
        "checkpoints", "report.html", "tokenizer.json", "wandb", "energy.json",
    }  # fmt: skip
    config = json.loads((tiny_run / "config.json").read_text())
    assert len(config["fingerprint"]) == 64
    assert config["experiment"]["model"]["$type"] == "slmjax.models.decoder:Decoder"
    assert (tiny_run / "experiment.py").read_text() == tiny.file.read_text()
    assert {"python", "packages", "git", "command"} <= set(json.loads((tiny_run / "environment.json").read_text()))
    assert state_of(read(tiny_run / "ledger.jsonl")) == "complete"
    page = (tiny_run / "report.html").read_text()
    assert config["stores"][0]["fingerprint"] == config["identity"]["stores"][0]
    assert f"fingerprint {config['stores'][0]['fingerprint'][:12]}" in page
    last = read(tiny_run / "metrics.jsonl")[-1]
    assert f"{last['validation/loss']:.4f} ± {last['validation/loss_se']:.4f}" in page


def test_every_step_is_recorded_and_the_model_learns(tiny_run):
    rows = read(tiny_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "batch", "epoch"} <= set(rows[-1])
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [row["step"] for row in rows if "validation/loss" in row] == [6, 12]
    assert len({row["batch"] for row in rows}) == 12


def test_the_offline_record_of_wandb_holds_the_config_and_every_step(tiny_run):
    """Read back from the file itself."""
    ids, config, history, _ = wandb_file.read(tiny_run / "wandb")
    written = json.loads((tiny_run / "config.json").read_text())
    assert ids == [(tiny_run / "wandb" / "run-id").read_text().strip()]
    assert {name: config[name] for name in ("fingerprint", "identity", "stores", "experiment")} == {
        name: written[name] for name in ("fingerprint", "identity", "stores", "experiment")
    }
    rows = read(tiny_run / "metrics.jsonl")
    assert [row["global_step"] for row in history] == [row["step"] for row in rows]
    for logged, row in zip(history, rows, strict=True):
        assert {k: v for k, v in logged.items() if k in row} == {k: v for k, v in row.items() if k in logged}
        assert row.keys() - logged.keys() <= {"step", "elapsed", "time"}


def test_a_second_call_finds_its_work_done(tiny_run, tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}
    again = slmjax("train", tiny.file, *runtime(tiny, tiny_run), "--runtime.checkpoints.every", "4")
    assert again.code == 0
    assert "complete, 12 steps; nothing to do" in again.out
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")} == before


def test_config_json_replays_to_the_same_numbers(tiny_run, tiny, tmp_path):
    done = slmjax(
        "train", tiny_run / "config.json", *runtime(tiny, tmp_path / "replay"), "--runtime.checkpoints.every", "0"
    )
    assert done.code == 0, done.err
    first, second = (json.loads((run / "config.json").read_text()) for run in (tiny_run, tmp_path / "replay"))
    assert first["fingerprint"] == second["fingerprint"]
    losses = [[row["loss"] for row in read(run / "metrics.jsonl")] for run in (tiny_run, tmp_path / "replay")]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_run, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / "12")  # killed before it was written
    array = max((run / "checkpoints" / "8" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    array.write_bytes(array.read_bytes()[:-100])
    done = slmjax("train", tiny.file, *runtime(tiny, run), "--runtime.checkpoints.every", "4")
    assert done.code == 0, done.err
    assert "checkpoint 8 is damaged" in done.err
    assert "resumed after step 4" in done.err
    assert (run / "checkpoints" / "bad-8").is_dir()
    expected, got = (
        [{k: repr(v) for k, v in row.items() if k not in CLOCK} for row in read(folder / "metrics.jsonl")]
        for folder in (tiny_run, run)
    )
    assert got == expected


def test_an_override_is_another_experiment(tiny_run, tiny):
    before = sorted(p.name for p in tiny_run.rglob("*"))
    refused = slmjax("train", tiny.file, *runtime(tiny, tiny_run), "--schedule.peak-lr", "0.5", "--data.batch", "4")
    assert refused.code == 2
    assert "schedule.peak_lr: 0.01 -> 0.5" in refused.err
    assert "data.batch: 8 -> 4" in refused.err
    assert refused.err.count("\n") == 1
    assert sorted(p.name for p in tiny_run.rglob("*")) == before


def test_samples_a_profile_and_a_grid_as_asked_for(tiny, tmp_path):
    done = slmjax(
        "train", tiny.file, *runtime(tiny, tmp_path / "run"), "--runtime.samples.every", "6",
        "--runtime.samples.prompts", "Call me", "The whale", "--runtime.samples.tokens", "8", "--runtime.profile",
        "--runtime.tracking.pue", "1.25", "--runtime.tracking.country", "FRA",
    )  # fmt: skip
    assert done.code == 0, done.err
    texts = [(tmp_path / "run" / "samples" / f"step-{step}.txt").read_text() for step in (6, 12)]
    assert all(text.startswith("Call me") and "\n\nThe whale" in text for text in texts)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    energy = json.loads((tmp_path / "run" / "energy.json").read_text())
    assert (energy["pue"], energy["grid"]["zone"]) == (1.25, "France")


@pytest.mark.parametrize(("field", "value"), [("pue", "0.9"), ("country", "France")])
def test_an_impossible_grid_is_refused(tiny, tmp_path, field, value):
    refused = slmjax("train", tiny.file, *runtime(tiny, tmp_path / "run"), f"--runtime.tracking.{field}", value)
    assert refused.code == 2
    assert f"runtime.tracking.{field}" in refused.err
    assert not (tmp_path / "run").exists()
