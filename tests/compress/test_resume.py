"""Quantization and pruning in the middle of a run: resumed before and after rounding begins, every bit is the same; and
what is exported is what was trained."""

import shutil

import jax
import numpy as np
import pytest
from running import runtime, slmjax

from slmjax import tree
from slmjax.cli.verify import CLOCK
from slmjax.runs.loading import load
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import restore_params, steps

FILE = """
from dataclasses import replace
from slmjax.compress.prune.view import Cubic, Prune
from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.learned import LSQ, SEQ
from slmjax.compress.quant.uniform import Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.experiment_file import load_experiment
from slmjax.train.guard import Skip
from slmjax.views import EMA, Chain

RULES = (
    Rule(quantizer=LSQ(bits=4, granularity=PerGroup(size=16)), patterns=("layers/attn/*",)),
    Rule(quantizer=Symmetric(bits=8), patterns=("embed/table",)),
    Rule(quantizer=SEQ()),
)


def experiment():
    base, _ = load_experiment({tiny!r})
    prune = Prune(schedule=Cubic(final=0.5, start=2, every=2, times=4))
    view = EMA(decay=0.9, of=Chain(views=(prune, Quantize(rules=RULES, share=0.5))))
    return replace(base, name="compressed", view=view, guard=Skip(sigma=None))
"""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run of 12 steps with a checkpoint after each second; weights are rounded from step 6, pruned from 2 to 10."""
    folder = tmp_path_factory.mktemp("compressed")
    file = folder / "compressed.py"
    file.write_text(FILE.format(tiny=str(tiny.file)))

    def train(name):
        out = folder / name
        options = ["--runtime.checkpoints.every", 2, "--runtime.checkpoints.keep-last", 10]
        done = slmjax("train", file, *runtime(tiny, out), *options)
        assert done.code == 0, done.err
        return out

    return train


def rows(folder):
    timed = (*CLOCK, "time", "elapsed")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(folder / "metrics.jsonl")]


def test_a_run_resumes_before_and_in_the_middle_of_rounding_bit_for_bit(run):
    whole = run("whole")
    copy = whole.with_name("stopped")
    shutil.copytree(whole, copy)
    for kept in (4, 8):  # rounding begins at step 6
        for step in steps(copy / "checkpoints"):
            if step > kept:
                shutil.rmtree(copy / "checkpoints" / str(step))
        assert run("stopped") == copy
        assert rows(copy) == rows(whole)
        saved = (restore_params(folder / "checkpoints") for folder in (copy, whole))
        jax.tree.map(np.testing.assert_array_equal, *saved)
        one, other = load(copy), load(whole)
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_what_is_evaluated_is_pruned_and_on_the_grid(run):
    loaded = load(run("whole"))
    flat = tree.flatten(loaded.params)
    assert {p.grid.levels for p in loaded.packed.values()} == {4, 16, 256}
    for path, packed in loaded.packed.items():
        np.testing.assert_array_equal(flat[path], packed.values())
    assert load(loaded.source, step=4).packed == {}, "not yet rounded"
    assert load(loaded.source, step=8).packed
