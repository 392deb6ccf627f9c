"""A sweep of real runs: planned, killed, run again; and what a plan refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from running import EXPERIMENT, ROOT, slmjax
from small_cells import base, made_up, planned, ran

from slmjax.sweeps import folder as folders
from slmjax.sweeps.making import grid
from slmjax.track.jsonl import read

SWEEP = """
from dataclasses import replace

from slmjax.config import override
from slmjax.sweeps.cells import Sweep
from slmjax.sweeps.making import grid, seeds


def base():
    small = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=384, context=64)
    return replace(experiment(), model=small, evaluation=Evaluation(every=1000, batches=1), steps=40)


def sweep():
    return Sweep(name="two", cells=seeds(base(), 2))


def repeats():
    return Sweep(name="repeats", cells=grid(base(), steps=(40, 4000)))


def silent():
    yield override(base(), "evaluation.every", 0)
"""


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweeps") / "sweep_of_two.py"
    file.write_text(EXPERIMENT.format(text=tiny.text) + SWEEP)
    return file


def test_killed_and_run_again(file, tiny, tmp_path):
    """SIGKILL for the sweep's process while a cell trains: that cell goes on alone. Of two commands that are
    run then, one runs the other cell, and both wait until all are complete."""
    out = tmp_path / "sweep"
    done = slmjax("sweep", "plan", file, "--out", out, "--data-dir", tiny.data_dir)
    assert done.code == 0, done.err
    assert "40 │ 10,240 │" in done.out
    folder = folders.read(out)
    command = [sys.executable, "-m", "slmjax.cli.main", "sweep", "run", str(out), "--no-populations", "--"]
    command += ["--runtime.tracking.wandb", "disabled"]
    flags = os.environ["XLA_FLAGS"].replace("host_platform_device_count=8", "host_platform_device_count=1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (begun := [c for c in folder.cells if (folder.run(c) / ".lock").exists()]):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (cell,) = begun
    assert folder.states()[cell.hash].name == "waiting"  # no sweep process has it

    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert not any(f"{cell.hash} started" in text for text in said)
    for each in folder.cells:
        events = [event["event"] for event in read(folder.run(each) / "ledger.jsonl")]
        assert events.count("started") == events.count("complete") == 1
        assert [row["step"] for row in read(folder.run(each) / "metrics.jsonl")] == list(range(1, 41))
        assert [e["event"] for e in folder.events() if e["cell"] == each.hash] == ["started", "complete"]
        config = json.loads((folder.run(each) / "config.json").read_text())
        assert config["runtime"]["tracking"]["group"] == "two"
        assert config["runtime"]["tracking"]["tags"] == [f"seed={each.seed}"]
    rows = folder.path.joinpath("results.tsv").read_text().splitlines()
    assert len(rows) == 3
    assert all("\tdone\t" in row for row in rows[1:])


def test_a_population_that_is_killed_goes_on_cell_by_cell(file, tiny, tmp_path):
    """SIGKILL for the process that trains both cells: each goes on alone from its checkpoint, by the same command."""
    out = tmp_path / "sweep"
    assert slmjax("sweep", "plan", file, "--out", out, "--data-dir", tiny.data_dir).code == 0
    folder = folders.read(out)
    assert len({cell.shape for cell in folder.cells}) == 1
    options = ["--runtime.tracking.wandb", "disabled", "--runtime.checkpoints.every", "4"]
    flags = os.environ["XLA_FLAGS"].replace("host_platform_device_count=8", "host_platform_device_count=1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "slmjax.cli.main", "sweep", "run", str(out), "--", *options]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    checkpoints = [folder.run(cell) / "checkpoints" / "4" for cell in folder.cells]
    deadline = time.monotonic() + 240
    while not all(path.is_dir() for path in checkpoints):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (pid,) = {read(folder.run(cell) / "ledger.jsonl")[-1]["pid"] for cell in folder.cells}
    os.kill(pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "started: 2 cells as one program: seed=0; seed=1" in said
    for each in folder.cells:
        events = [event["event"] for event in folder.events() if event["cell"] == each.hash]
        assert events == ["started", "apart", "started", "complete"]
        own = read(folder.run(each) / "ledger.jsonl")
        assert [e["among"] for e in own if "among" in e] == [2]
        assert next(e["step"] for e in own if e["event"] == "resumed") >= 4
        assert [row["step"] for row in read(folder.run(each) / "metrics.jsonl")] == list(range(1, 41))


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    broken, done = grid(base(), steps=(5, 6))
    pairs = [(broken, planned(broken, code=True)), (done, planned(done))]
    folder = made_up(tmp_path / "s", pairs, source="nowhere.py")
    ran(folder, folder.cells[1])
    ended = slmjax("sweep", "run", folder.path)
    assert ended.code == 2
    assert "1 of 2 cells complete, 1 failed" in ended.err
    state = folder.states()[folder.cells[0].hash]
    assert state.name == "failed"
    assert state.reason == "nowhere.py: no such file; expected a Python file (exit code 2)"
    assert [e["event"] for e in folder.events() if e["cell"] == folder.cells[0].hash] == ["started", "failed"]


def test_what_a_plan_refuses_and_warns_of(file, tiny, tmp_path):
    place = ["--out", tmp_path / "s", "--data-dir", tiny.data_dir]
    done = slmjax("sweep", "plan", f"{file}:repeats", *place, "--memory-gb", "0.00001", "--json")
    assert done.code == 2
    assert "slmjax: error: 2 of 2 cells do not fit" in done.err
    assert "(steps=40) takes " in done.err
    plan = json.loads(done.out)
    short, long = plan["cells"]
    assert long["unique_tokens"] < long["tokens"] == 4000 * 8 * 32
    assert short["unique_tokens"] == short["tokens"]
    assert "1 of 2 cells repeat their data, steps=4000" in plan["warnings"][0]
    assert long["flops"] == pytest.approx(100 * short["flops"])
    assert long["seconds"] == pytest.approx(100 * short["seconds"])
    for function, words in (("silent", "evaluation.every is 0"), ("missing", "there is no function missing()")):
        refused = slmjax("sweep", "plan", f"{file}:{function}", *place)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert words in refused.err
    assert not (tmp_path / "s").exists()
