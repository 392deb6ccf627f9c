"""Runs that train together are the runs that train one by one."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import slmjax
from slmjax.config import Evaluation, Runtime, Tracking, override
from slmjax.errors import Diverged, UserError
from slmjax.experiment_file import load_experiment
from slmjax.runs import populations
from slmjax.serialise import to_json
from slmjax.track.jsonl import read
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import restore_params, steps
from slmjax.train.guard import Halt

STEPS = 6
VARIED = ({}, {"seed": 3, "data.seed": 5, "schedule.peak_lr": 3e-3}, {"optimizer.weight_decay": 0.5})


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(changes -> an experiment, name -> the runtime of a folder)"""
    small, _ = load_experiment(str(tiny.file))
    base = replace(small, steps=STEPS, guard=Halt(sigma=None), evaluation=Evaluation(every=3, batches=1))
    folder = tmp_path_factory.mktemp("populations")

    def experiment(changes):
        made = base
        for path, value in changes.items():
            made = override(made, path, value)
        return made

    def runtime(name, **fields):
        return Runtime(
            workdir=str(folder / name), data_dir=str(tiny.data_dir), dtype="float32",
            tracking=Tracking(wandb="disabled"), checkpoints=Checkpoints(every=2, keep_last=9), **fields,
        )  # fmt: skip

    return experiment, runtime, folder


def together(made, name, several):
    experiment, runtime, _ = made
    return populations.train([(experiment(c), runtime(f"{name}-{i}"), None) for i, c in enumerate(several)])


@pytest.fixture(scope="module")
def three(made):
    """The folder of a population; the names of its runs are three-0, three-1, three-2."""
    assert together(made, "three", VARIED) == [None] * 3
    return made[2]


def losses(folder, names=("loss", "validation/loss", "grad_norm", "lr", "batch")):
    return [[row.get(name, 0.0) for name in names] for row in read(folder / "metrics.jsonl")]


def test_each_is_its_single_run(made, three):
    experiment, runtime, folder = made
    slmjax.train(experiment(VARIED[2]), runtime=runtime("alone-2"))  # run 1: below
    alone, there = folder / "alone-2", three / "three-2"
    np.testing.assert_allclose(losses(there), losses(alone), rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-5),
        *(restore_params(x / "checkpoints") for x in (there, alone)),
    )
    for name in ("config.json", "compute.json", "tokenizer.json", "report.html", "energy.json"):
        assert (there / name).is_file() == (alone / name).is_file()
    assert len({row[-1][0] for row in map(losses, (three / f"three-{i}" for i in range(3)))}) == 3


def test_one_that_diverges_leaves_the_others_as_they_are(made, three):
    _, _, folder = made
    wild = {"optimizer.weight_decay": 0.5, "schedule.peak_lr": 1e12}
    ended = together(made, "wild", (*VARIED[:2], wild))
    assert ended[:2] == [None, None]
    assert isinstance(ended[2], Diverged)
    for i in range(2):
        assert losses(folder / f"wild-{i}") == losses(three / f"three-{i}")
        jax.tree.map(
            np.testing.assert_array_equal,
            *(restore_params(folder / f"{name}-{i}" / "checkpoints") for name in ("wild", "three")),
        )
    events = [event["event"] for event in read(folder / "wild-2" / "ledger.jsonl")]
    assert events[-1] == "diverged"
    assert (folder / "wild-2" / "evidence").is_dir()
    with pytest.raises(Diverged, match="1 of 3 runs diverged: step"):
        populations.verdict(ended)


def test_what_a_kill_leaves_goes_on_alone_and_together(made, three):
    experiment, runtime, folder = made

    def cut(name, i, last):
        shutil.copytree(three / f"three-{i}", folder / f"{name}-{i}")
        for step in steps(folder / f"{name}-{i}" / "checkpoints"):
            if step > last:
                shutil.rmtree(folder / f"{name}-{i}" / "checkpoints" / str(step))

    for i, last in enumerate((4, 2, 6)):
        cut("again", i, last)
    assert together(made, "again", VARIED) == [None] * 3
    for i in range(3):
        np.testing.assert_allclose(losses(folder / f"again-{i}"), losses(three / f"three-{i}"), rtol=1e-6)
        assert steps(folder / f"again-{i}" / "checkpoints") == [2, 4, 6]
    cut("one", 1, 4)
    slmjax.train(experiment(VARIED[1]), runtime=runtime("one-1"))
    np.testing.assert_allclose(losses(folder / "one-1"), losses(three / "three-1"), rtol=2e-5)


def test_what_may_train_together(made):
    experiment, runtime, _ = made
    shape = populations.shape_of(to_json(experiment({})))
    for changes in VARIED[1:]:
        assert populations.shape_of(to_json(experiment(changes))) == shape
    for changes in ({"steps": 7}, {"optimizer.clip_norm": None}, {"seed": 2**40}, {"schedule.warmup_steps": 1}):
        assert populations.shape_of(to_json(experiment(changes))) != shape
    with pytest.raises(UserError, match=r"they differ in steps: 6 -> 7\. What may differ are seeds and schedule"):
        populations.train([(experiment(c), runtime("none"), None) for c in ({}, {"steps": 7})])
