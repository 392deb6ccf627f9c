"""Several numbers of steps of one cell share their stable phase, and are bit for bit the runs from step 0."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from running import EXPERIMENT, slmjax
from small_cells import base

from slmjax.cli.verify import CLOCK
from slmjax.experiment_file import load_experiment
from slmjax.optim.schedules import WSD, Constant, Cosine
from slmjax.runs.branching import same_steps
from slmjax.sweeps import folder as folders
from slmjax.sweeps.making import horizons
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import restore_params

SWEEP = """
from dataclasses import replace

from slmjax.optim.schedules import WSD
from slmjax.sweeps.making import horizons


def sweep():
    small = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=384, context=64)
    schedule = WSD(peak_lr=1e-2, warmup_steps=2, decay_fraction=0.5)
    evaluation = Evaluation(every=1000, batches=1)
    yield from horizons(replace(experiment(), model=small, schedule=schedule, evaluation=evaluation), (6, 10, 16))
"""


@pytest.mark.fast
def test_where_learning_rates_part():
    def steps(schedule, one, other):
        return same_steps(base(schedule=schedule, steps=one), base(schedule=schedule, steps=other))

    assert steps(WSD(peak_lr=1e-2, warmup_steps=3, decay_fraction=0.25), 20, 40) == 16  # the decay begins at its peak
    assert steps(Constant(peak_lr=1e-2), 20, 40) == 20
    assert steps(Cosine(peak_lr=1e-2, warmup_steps=3), 20, 40) == 4
    assert [c.experiment.steps for c in horizons(base(), (5, 7))] == [5, 7]


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """The folder of a sweep of three numbers of steps, run."""
    place = tmp_path_factory.mktemp("trunks")
    file = place / "three_horizons.py"
    file.write_text(EXPERIMENT.format(text=tiny.text) + SWEEP)
    planned = slmjax("sweep", "plan", file, "--out", place / "s", "--data-dir", tiny.data_dir)
    assert planned.code == 0, planned.err
    assert "2 cells go on from a checkpoint of a shorter one" in planned.out
    folder = folders.read(place / "s")
    for cell in folder.cells:  # in this process, as `slmjax sweep run` calls it
        assert folders.ready(folder.cells, folder.states())[0] == cell
        done = slmjax("sweep", "cells", folder.path, cell.hash, "--", "--runtime.tracking.wandb", "disabled")
        assert done.code == 0, done.err
    return folder


def rows(run):
    timed = (*CLOCK, "time", "elapsed")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(Path(run) / "metrics.jsonl")]


def test_the_plan_counts_what_is_shared_once(swept):
    short, middle, long = swept.cells
    assert (short.trunk, short.shared, short.keep) == ("", 0, 4)
    assert (middle.trunk, middle.shared, middle.keep) == (short.hash, 4, 6)
    assert (long.trunk, long.shared) == (middle.hash, 6)
    assert [cell.own for cell in swept.cells] == pytest.approx([1, 0.6, 10 / 16])


def test_a_longer_run_is_bit_for_bit_the_run_from_step_0(swept, tiny, tmp_path):
    long = swept.cells[2]
    begun = read(swept.run(long) / "ledger.jsonl")
    assert begun[0]["step"] == 6
    assert [e["step"] for e in begun if e["event"] == "resumed"] == [6]
    words = ["train", swept.config(long), "--runtime.workdir", tmp_path / "whole", "--runtime.data-dir", tiny.data_dir]
    done = slmjax(*words, "--runtime.tracking.wandb", "disabled")
    assert done.code == 0, done.err
    assert rows(swept.run(long)) == rows(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal,
        *(restore_params(run / "checkpoints") for run in (swept.run(long), tmp_path / "whole")),
    )
    states = swept.states()
    assert [states[cell.hash].name for cell in swept.cells] == ["complete"] * 3
    assert states[long.hash].seconds < read(swept.run(long) / "metrics.jsonl")[-1]["elapsed"]


def test_a_cell_waits_for_its_trunk_and_not_for_one_that_failed(swept):
    short, middle, _ = swept.cells
    waiting = dict.fromkeys((cell.hash for cell in swept.cells), folders.State(name="waiting"))
    assert folders.ready(swept.cells, waiting) == [short]
    failed = waiting | {short.hash: folders.State(name="failed")}
    assert folders.ready(swept.cells, failed) == [short, middle]
    assert replace(load_experiment(str(swept.config(short)))[0], name="").steps == 6
