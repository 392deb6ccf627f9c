"""SIGKILL in the first step, in a save and at random: from there on, the same bits as a run never killed."""

import json

import pytest
from running import slmjax

from slmjax.cli.verify import compare


def test_verify_resume(tiny, tmp_path, monkeypatch):
    done = slmjax(
        "verify", "resume", tiny.file, "--steps", "4", "--every", "2", "--kills", "3", "--keep", tmp_path / "v",
        "--", "--runtime.data-dir", tiny.data_dir,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "bit-identical: 4 steps" in done.out
    assert "kill 3 of 3" in done.out

    runs = [tmp_path / "v" / name for name in ("undisturbed", "killed")]
    metrics = runs[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]

    rows[2]["loss"] *= 1 + 1e-7  # the comparison sees one bit
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, _ = compare(*runs, 4)
    assert len(problems) == 1
    assert problems[0].startswith("step 3: loss")


@pytest.mark.parametrize("args", [["--steps", "7"], ["--every", "0"]])
def test_impossible_steps_are_refused(tiny, args):
    refused = slmjax("verify", "resume", tiny.file, *args)
    assert refused.code == 2
    assert "--steps" in refused.err


def test_more_steps_than_the_experiment_has_are_refused(tiny, tmp_path):
    """It has 12."""
    where = ["--runtime.data-dir", tiny.data_dir, "--evaluation.every", "0"]
    refused = slmjax("verify", "resume", tiny.file, "--steps", "20", "--", *where)
    assert refused.code == 2
    assert "the experiment ends before that" in refused.err
