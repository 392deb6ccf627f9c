"""Trains an experiment file at a size for tests."""

import pytest
from running import ROOT, slmjax

DATA = ROOT / ".cache" / "test-data"
"""The quickstart's token store is built once, in seconds, and kept: its name is a hash of what it is made from"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Runs a file's experiment at a size for tests -> the run folder."""
    folder = tmp_path_factory.mktemp("design")

    def train(file, name, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            done = slmjax(
                "train", file, "--runtime.workdir", folder / name, "--runtime.data-dir", DATA,
                "--runtime.tracking.wandb", "disabled", "--data.batch", 8,
                "--data.length", 32, "--steps", 30, "--schedule.warmup-steps", 3, "--evaluation.every", 15,
                "--evaluation.batches", 2, "--model.repeats", 2, *more,
            )  # fmt: skip
        assert done.code == 0, done.err
        return folder / name

    return train
