"""`train RUN --extend N`: from before the decay, bit for bit the run that had all its steps from the beginning."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from running import slmjax as command

import slmjax
from slmjax.cli.verify import CLOCK
from slmjax.config import Runtime, Tracking, override
from slmjax.experiment_file import load_experiment
from slmjax.optim.schedules import WSD, Constant, Cosine, InverseSqrt, Linear
from slmjax.runs.loading import load
from slmjax.runs.rates import fall, jump, parting, rates
from slmjax.track.jsonl import read
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import steps


@pytest.fixture(scope="module")
def base(tiny):
    """WSD over 12 steps: the learning rate is at its peak up to the tenth update."""
    experiment, _ = load_experiment(str(tiny.file))
    return replace(experiment, schedule=WSD(peak_lr=1e-2, warmup_steps=2, decay_fraction=0.25))


@pytest.fixture(scope="module")
def parent(base, tiny, tmp_path_factory):
    """The folder of the run; of its checkpoints the last one is kept, and the one before the decay."""
    folder = tmp_path_factory.mktemp("extending") / "short"
    slmjax.train(base, runtime=runtime(tiny, folder))
    assert steps(folder / "checkpoints") == [10, 12]
    return folder


def runtime(tiny, folder):
    return Runtime(
        workdir=str(folder),
        data_dir=str(tiny.data_dir),
        dtype="float32",
        tracking=Tracking(wandb="disabled"),
        checkpoints=Checkpoints(every=0, keep_last=1),
    )


def rows(folder):
    timed = (*CLOCK, "time", "elapsed")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(folder / "metrics.jsonl")]


def test_an_extended_run_is_the_whole_run(base, parent, tiny):
    options = ("--runtime.dtype", "float32", "--runtime.tracking.wandb", "disabled")
    done = command("train", parent, "--extend", "6", *options)
    assert done.code == 0, done.err
    part = parent.with_name("short-18")
    assert f"{part}: goes on from step 10 of {parent}, to 18" in done.out
    whole = slmjax.train(replace(base, steps=18), runtime=runtime(tiny, parent.with_name("whole"))).folder
    assert rows(part) == rows(whole)
    jax.tree.map(np.testing.assert_array_equal, load(part).params, load(whole).params)
    assert (
        json.loads((part / "config.json").read_text())["fingerprint"]
        == json.loads((whole / "config.json").read_text())["fingerprint"]
    )
    assert steps(parent / "checkpoints") == [10, 12], "the parent is as it was"
    assert "complete, 18 steps" in command("train", parent, "--extend", "6", *options).out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--extend", "0"], "--extend is '0'; expected how many steps more"),
        (["--extend"], "--extend is ''; expected how many steps more"),
        (["--extend", "3", "--steps", "20"], "give one of them"),
        (["--extend", "3", "--seed", "1"], "differs in seed: 0 -> 1"),
        (["--extend", "3", "--schedule.peak-lr", "2e-2"], "no checkpoint of the first 0 steps"),
    ],
)
def test_mistakes(parent, tmp_path, argv, words):
    done = command("train", parent, *argv, "--runtime.workdir", tmp_path / "new")
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "new").exists()
    assert "--extend needs a run folder first" in command("train", tmp_path, "--extend", "3").err


def test_changing_a_run_says_what_becomes_of_the_learning_rate(parent):
    place = ("--runtime.workdir", parent, "--runtime.data-dir", parent.parent / "none")
    config = json.loads((parent / "config.json").read_text())
    place = ("--runtime.workdir", parent, "--runtime.data-dir", config["runtime"]["data_dir"])
    longer = command("train", parent, *place, "--steps", "14")
    assert longer.code == 2
    assert "differs in steps: 12 -> 14" in longer.err
    assert "the learning rate goes from 0.00333 at step 12 to 0.005 at step 13" in longer.err
    assert f"slmjax train {parent} --extend 2" in longer.err
    shorter = command("train", parent, *place, "--steps", "8", "--schedule.warmup-steps", "2")
    assert "--runtime.overwrite-changed" not in shorter.err
    for change in (("--steps", "8", "--schedule.warmup-steps", "2"), ("--seed", "1")):
        refused = command("train", parent, *place, *change, "--runtime.overwrite-changed")
        assert refused.code == 2
        assert "has made 12 steps; with steps" in refused.err
    assert json.loads((parent / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("schedule", "falls", "common"),
    [
        (WSD(peak_lr=1.0, warmup_steps=2, decay_fraction=0.25), 10, 10),
        (WSD(peak_lr=1.0, decay_fraction=0.0), None, 12),
        (Constant(peak_lr=1.0, warmup_steps=3), None, 12),
        (InverseSqrt(peak_lr=1.0, warmup_steps=4), None, 12),
        (Cosine(peak_lr=1.0, warmup_steps=4), None, 5),
        (Linear(peak_lr=1.0), None, 1),
    ],
    ids=lambda x: type(x).__name__,
)
def test_where_learning_rates_fall_and_part(base, schedule, falls, common):
    """Against the definition of each schedule, step by step."""
    short, long = (override(replace(base, steps=n), "schedule", schedule) for n in (12, 20))
    each = [float(schedule.build(12)(i)) for i in range(12)]
    np.testing.assert_allclose(rates(short), each, rtol=1e-6)
    assert fall(rates(short)) == falls
    assert parting(rates(short), rates(long)) == common
    assert jump(short, short, 5) is None
    assert jump(short, long, 0) is None
