"""A branch of a run is, bit for bit, the run that was trained from step 0."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import slmjax
from slmjax.cli.verify import CLOCK
from slmjax.compress.quant.learned import LSQ, SEQ
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.config import Runtime, Tracking, identity
from slmjax.distill.objective import Distill
from slmjax.errors import UserError
from slmjax.experiment_file import load_experiment
from slmjax.runs.branching import branch
from slmjax.runs.loading import load
from slmjax.runs.parent import Parent, parent_of
from slmjax.track.jsonl import read
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import restore_params
from slmjax.train.guard import Skip
from slmjax.views import EMA

RULES = (Rule(quantizer=LSQ(bits=4), patterns=("layers/attn/q",)), Rule(quantizer=SEQ(), patterns=("layers/mlp/up",)))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(experiment with a view, runtime of a folder, the parent's folder)"""
    base, _ = load_experiment(str(tiny.file))
    folder = tmp_path_factory.mktemp("branching")

    def experiment(view, **changes):
        return replace(base, guard=Skip(sigma=None), view=view, **changes)

    def runtime(name):
        return Runtime(
            workdir=str(folder / name),
            data_dir=str(tiny.data_dir),
            dtype="float32",
            tracking=Tracking(wandb="disabled"),
            checkpoints=Checkpoints(every=0, keep_every=5),
        )

    slmjax.train(experiment(EMA(decay=0.9)), runtime=runtime("parent"))
    return experiment, runtime, folder / "parent"


def rows(folder):
    timed = (*CLOCK, "time", "elapsed")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(folder / "metrics.jsonl")]


def test_a_branch_has_the_models_that_its_parent_learns_from(made):
    """By their content, wherever they lie: else each branch of a distilled run would be refused as another one."""
    experiment, _, folder = made
    run = parent_of(folder)
    distilled, models = experiment(EMA(), objective=Distill(teachers=("teacher",))), {"teacher": "0" * 64}
    known = identity(distilled, run.config["identity"]["stores"], None, models)
    parent = Parent(folder, {**run.config, "identity": known, "models": models}, distilled)
    assert parent.identity_of(distilled) == known
    assert "0" * 64 in str(known)


def test_a_branch_is_the_whole_run(made):
    experiment, runtime, parent = made
    later = experiment(EMA(decay=0.9, of=Quantize(rules=RULES, share=0.5)))  # rounds from step 6
    whole = slmjax.train(later, runtime=runtime("whole")).folder
    assert branch(parent, later, runtime("branch")) == 5
    part = slmjax.train(later, runtime=runtime("branch")).folder
    assert rows(part) == rows(whole)
    assert load(part).config["fingerprint"] == load(whole).config["fingerprint"]
    jax.tree.map(np.testing.assert_array_equal, *(restore_params(x / "checkpoints") for x in (part, whole)))
    jax.tree.map(np.testing.assert_array_equal, load(part).params, load(whole).params)
    assert len(load(part).packed) == len(load(whole).packed) > 0
    assert branch(parent, later, runtime("branch")) == 12, "complete already"


@pytest.mark.parametrize(
    ("view", "changes", "said"),
    [
        (Quantize(rules=RULES, share=0.5), {}, "view"),
        (EMA(decay=0.8, of=Quantize(rules=RULES, share=0.5)), {}, r"view.*decay"),
        (EMA(decay=0.9, of=Quantize(rules=RULES, share=0.5)), {"seed": 1}, "seed"),
        (EMA(decay=0.9, of=Quantize(rules=RULES)), {}, "no checkpoint of a step before 0"),
    ],
)
def test_what_cannot_be_the_beginning(made, view, changes, said):
    experiment, runtime, parent = made
    with pytest.raises(UserError, match=said):
        branch(parent, experiment(view, **changes), runtime("none"))
    shutil.rmtree(runtime("none").workdir, ignore_errors=True)
