"""Jobs of a real SLURM: preempted, cancelled, requeued, of several nodes, and of a node that is lost."""

import os
import re
import signal

import numpy as np
import pytest
from running import runtime, slmjax

from slmjax.sweeps import folder as folders
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import steps

pytestmark = pytest.mark.slurm

QUIET = ["--runtime.tracking.wandb", "disabled"]
CLOCK = ("step_seconds", "tokens_per_second", "mfu", "memory_bytes", "elapsed", "time")


def launch(*words):
    """-> the number of the job."""
    done = slmjax("launch", "slurm", *words)
    assert done.code == 0, done.err
    return re.search(r"submitted job (\d+): ", done.out)[1]


def numbers(rows):
    """Rows of metrics without what depends on the machine."""
    return [{name: x for name, x in row.items() if name not in CLOCK} for row in rows]


def table(folder):
    """results.tsv without the column of seconds."""
    rows = [line.split("\t") for line in (folder.path / folders.RESULTS).read_text().splitlines()]
    at = rows[0].index("seconds")
    return [row[:at] + row[at + 1 :] for row in rows]


def own_events(folder, cell):
    return [event["event"] for event in read(folder.run(cell) / "ledger.jsonl")]


def ended(slurm, job):
    """Whether no task of it is left in the queue; SLURM forgets a job some time after its end."""
    return lambda: not slurm.ask("squeue", "-h", "-a", "--states=PD,R,CG,CF,S", "-o", "%A %F").count(job)


def logs(folder):
    return "".join(f"\n{file.name}: {file.read_text()}" for file in sorted((folder.path / "logs").glob("slurm-*.log")))


def test_an_array_runs_every_cell_once(slurm, sweeps, tmp_path):
    folder = folders.read(sweeps.plan("several", tmp_path / "sweep"))
    job = launch(folder.path, "--tasks", 2, "--", *QUIET)
    slurm.wait(ended(slurm, job))
    for cell in folder.cells:
        assert [e["event"] for e in folder.events() if e["cell"] == cell.hash] == ["started", "complete"], logs(folder)
        assert [row["step"] for row in read(folder.run(cell) / "metrics.jsonl")] == list(range(1, 21))
        assert "done: " in folder.log(cell).read_text()
    assert len({(e["host"], e["pid"]) for e in folder.events()}) == 2
    assert len(list((folder.path / "logs").glob("slurm-*_*.log"))) == 2
    assert {state.name for state in folder.states().values()} == {"complete"}


@pytest.fixture(scope="module")
def undisturbed(sweeps, slurm, tmp_path_factory):
    folder = folders.read(sweeps.plan("long", tmp_path_factory.mktemp("undisturbed") / "sweep"))
    done = slmjax("sweep", "run", folder.path, "--", *QUIET)
    assert done.code == 0, done.err
    return folder


def stopped_midway(slurm, folder):
    """The process id of the cell's run, which stands still (SIGSTOP) in the middle of its steps."""
    (cell,) = folder.cells
    slurm.wait(lambda: len(read(folder.run(cell) / "metrics.jsonl")) > 20)
    pid = read(folder.run(cell) / "ledger.jsonl")[-1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert len(read(folder.run(cell) / "metrics.jsonl")) < cell.steps, "the cell is too short for this test"
    return pid


def equal(folder, other):
    (cell,) = folder.cells
    assert table(folder) == table(other)
    rows = read(folder.run(cell) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, cell.steps + 1))
    assert numbers(rows) == numbers(read(other.run(cell) / "metrics.jsonl"))


def test_a_preempted_job_saves_and_is_requeued(slurm, sweeps, tmp_path, undisturbed):
    folder = folders.read(sweeps.plan("long", tmp_path / "sweep"))
    (cell,) = folder.cells
    job = launch(folder.path, "--", *QUIET)
    run = stopped_midway(slurm, folder)
    whole = ["--partition=high", "--nodes=3", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=true"]
    high = slurm.ask("sbatch", "--parsable", *whole)
    slurm.wait(lambda: "stopping 1 runs" in logs(folder))
    os.kill(run, signal.SIGCONT)
    slurm.wait(ended(slurm, high))
    assert own_events(folder, cell)[-1] == "preempted", logs(folder)
    slurm.wait(ended(slurm, job))
    assert [e["event"] for e in folder.events()] == ["started", "stopped", "started", "complete"], logs(folder)
    assert "resumed" in own_events(folder, cell)
    equal(folder, undisturbed)


def test_a_cancelled_job_stays_cancelled_and_its_folder_resumes(slurm, sweeps, tmp_path, undisturbed):
    folder = folders.read(sweeps.plan("long", tmp_path / "sweep"))
    (cell,) = folder.cells
    job = launch(folder.path, "--", *QUIET)
    run = stopped_midway(slurm, folder)
    slurm.ask("scancel", job)
    slurm.wait(lambda: "stopping 1 runs" in logs(folder))
    os.kill(run, signal.SIGCONT)
    slurm.wait(ended(slurm, job))
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert own_events(folder, cell)[-1] == "preempted", logs(folder)
    assert steps(folder.run(cell) / "checkpoints")
    done = slmjax("sweep", "run", folder.path, "--", *QUIET)
    assert done.code == 0, done.err
    assert "resumed" in own_events(folder, cell)
    equal(folder, undisturbed)


def test_the_orphan_of_a_lost_node_writes_no_more(slurm, sweeps, tmp_path, undisturbed):
    """slurmd and slurmstepd are killed, and what could tell the run to end; the run itself stands still until SLURM has
    started the job again on another node, and goes on when that has the lease."""
    folder = folders.read(sweeps.plan("long", tmp_path / "sweep"))
    (cell,) = folder.cells
    job = launch(folder.path, "--", *QUIET, "--runtime.checkpoints.every", 10)
    orphan = stopped_midway(slurm, folder)
    node, run = slurm.job(job)["NodeList"], folder.run(cell)
    slurm.crash(node, keep=orphan)
    slurm.wait(lambda: (run / ".lock.lease" / "2").exists())
    assert slurm.job(job)["NodeList"] != node
    os.kill(orphan, signal.SIGCONT)
    slurm.wait(lambda: not os.path.exists(f"/proc/{orphan}"))
    slurm.wait(ended(slurm, job))
    slurm.start_node(node)

    assert "attempt 2, process" in folder.log(cell).read_text()
    assert "has taken over from this process, attempt 1, which stops and writes no more" in folder.log(cell).read_text()
    events = read(run / "ledger.jsonl")
    second = next(i for i, e in enumerate(events) if e["attempt"] == 2)
    assert {e["attempt"] for e in events[second:]} == {2}
    assert {e["event"] for e in events[:second]} <= {"created", "started", "saved", "evaluated"}
    equal(folder, undisturbed)


def test_three_nodes_train_as_one_process_does(slurm, tiny, tmp_path):
    """In the middle, the batch shell is told that the time limit is near: all save the same step, and are requeued."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    fixed = ["--steps", 100, "--data.batch", 6, "--evaluation.every", 100, "--runtime.dtype", "float32", *QUIET]
    done = slmjax("train", tiny.file, *runtime(tiny, alone), *fixed)
    assert done.code == 0, done.err
    job = launch(tiny.file, "--nodes", 3, "--", *runtime(tiny, run), *fixed)
    slurm.wait(lambda: len(read(run / "metrics.jsonl")) > 3)
    first = read(run / "ledger.jsonl")[-1]["pid"]
    os.kill(first, signal.SIGSTOP)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    os.kill(first, signal.SIGCONT)
    slurm.wait(ended(slurm, job))
    said = (tmp_path / "run.slurm" / f"{job}.log").read_text()
    events = [event["event"] for event in read(run / "ledger.jsonl")]
    assert events == ["created", "started", "preempted", "started", "resumed", "evaluated", "saved", "complete"], said
    one, three = read(alone / "metrics.jsonl"), read(run / "metrics.jsonl")
    assert [row["step"] for row in three] == list(range(1, 101)), said
    assert "3 cpu (data=3" in said
    assert [row["batch"] for row in three] == [row["batch"] for row in one]
    for name in ("loss", "grad_norm"):
        got, expected = ([row[name] for row in rows[:20]] for rows in (three, one))
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(three[-1]["validation/loss"], one[-1]["validation/loss"], rtol=1e-2)
