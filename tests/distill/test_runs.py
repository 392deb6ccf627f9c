"""A student of a real teacher by `slmjax train`: it resumes bit for bit, and is used without its teacher."""

import json
import shutil

import jax
import numpy as np
import pytest
from running import runtime, slmjax

from slmjax.cli.verify import CLOCK
from slmjax.models.flops import flops_per_token
from slmjax.runs.comparing import entry
from slmjax.runs.loading import load
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import restore_params
from slmjax.tree import flatten

FILE = """
from dataclasses import replace
from slmjax.distill.features import HiddenMSE
from slmjax.distill.layer_maps import Last
from slmjax.distill.objective import Distill
from slmjax.distill.relations import Relations
from slmjax.distill.terms import Ramp, Term
from slmjax.experiment_file import load_experiment
from slmjax.models.families.llama import llama


def experiment():
    base, _ = load_experiment({tiny!r})
    student = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=32, vocab=400, context=64)
    terms = (
        Term(loss=HiddenMSE(layers=Last(), teacher_width=32), weight=Ramp(start=0.1, end=0.5, steps=6)),
        Term(loss=Relations(layers=Last(), heads=4)),
    )
    return replace(base, name="student", model=student, objective=Distill(teachers=({teacher!r},), terms=terms))
"""


@pytest.fixture(scope="module")
def student(tiny, tiny_run, tmp_path_factory):
    """`train(name, *options)` -> the result, and the run folder."""
    folder = tmp_path_factory.mktemp("distilled")
    teacher = folder / "teacher"
    shutil.copytree(tiny_run, teacher)
    file = folder / "student.py"
    file.write_text(FILE.format(tiny=str(tiny.file), teacher=str(teacher)))

    def train(name, *options):
        out = folder / name
        every = ("--runtime.checkpoints.every", 4, "--runtime.checkpoints.keep-last", 10)
        return slmjax("train", file, *runtime(tiny, out), *every, *options), out

    train.teacher = teacher
    return train


def rows(folder):
    timed = (*CLOCK, "time", "elapsed")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(folder / "metrics.jsonl")]


def test_it_resumes_bit_for_bit_and_needs_no_teacher_afterwards(student, tmp_path):
    done, whole = student("whole")
    assert done.code == 0, done.err
    last = rows(whole)[-1]
    assert {"divergence", "teacher_loss", "agreement", "loss"} <= {k.removeprefix("validation/") for k in last}
    assert {"hidden_mse", "relation_kl", "validation/relation_kl"} <= last.keys()
    assert "validation/hidden_mse" not in last, "its projection is not evaluated"
    path = "view/objective/0/projection"
    four, eight = (flatten(restore_params(whole / "checkpoints", step))[path] for step in (4, 8))
    assert np.abs(eight - four).max() > 1e-3, "the projection is trained"
    copy = whole.with_name("stopped")
    shutil.copytree(whole, copy)
    for step in (8, 12):
        shutil.rmtree(copy / "checkpoints" / str(step))
    done, _ = student("stopped")
    assert done.code == 0, done.err
    assert rows(copy) == rows(whole)
    saved = (restore_params(folder / "checkpoints") for folder in (copy, whole))
    jax.tree.map(np.testing.assert_array_equal, *saved)

    found = slmjax("eval", whole, "--batches", 2, "--json")
    assert found.code == 0, found.err
    found = json.loads(found.out)
    assert found["teacher"] == str(student.teacher)
    assert 0 <= found["same_as_teacher"] < 1
    assert found["kl_from_teacher"] > 0
    theirs, ours = (flops_per_token(load(folder).decoder, 32).attention for folder in (student.teacher, whole))
    compared = entry(whole)
    assert compared.flops_per_token == pytest.approx(ours + theirs / 3), "the teacher has no backward pass"
    assert compared.teaching_share == pytest.approx(theirs / 3 / (ours + theirs / 3))
    itself = json.loads(slmjax("eval", whole, "--teacher", whole, "--batches", 1, "--json").out)
    assert itself["same_as_teacher"] == 1
    assert itself["kl_from_teacher"] == pytest.approx(0, abs=1e-6)

    moved = student.teacher.with_name("elsewhere")
    student.teacher.rename(moved)
    try:
        for words in (("eval", whole, "--batches", 1), ("generate", whole, "--prompt", "Call me", "--max-tokens", 2)):
            done = slmjax(*words)
            assert done.code == 0, done.err
            assert "likeliest" not in done.out
        done, _ = student("whole")
        assert "nothing to do" in done.out
        shutil.rmtree(copy / "checkpoints" / "12")
        done, _ = student("stopped")
        assert done.code == 2
        assert "is not there; put the model back" in done.err
        done, new = student("new")
        assert done.code == 2
        assert "no such folder" in done.err
        assert not new.exists()
    finally:
        moved.rename(student.teacher)


def test_the_same_teacher_elsewhere_is_the_same_experiment(student, tmp_path):
    _, whole = student("whole")
    shutil.copytree(student.teacher, tmp_path / "copy")
    done, _ = student("whole", "--objective.teachers", tmp_path / "copy")
    assert "nothing to do" in done.out
    config = json.loads((whole / "config.json").read_text())
    assert config["identity"]["objective"]["teachers"] == list(config["models"].values())
    done, _ = student("whole", "--objective.teachers", tmp_path / "copy" / "checkpoints" / "6")
    assert done.code == 2


def test_terms_that_do_not_fit_are_refused_before_there_is_a_folder(student):
    done, new = student("refused", "--objective.terms.0.loss.teacher-width", 31)
    assert done.code == 2
    assert (
        "terms.0.loss.teacher_width: 31, but hidden vectors of the teacher have 32 channels; set it to 32" in done.err
    )
    assert done.err.count("\n") == 1
    assert not new.exists()
