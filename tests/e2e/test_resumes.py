"""A run that is interrupted two and three times, with workers that read ahead, sees the batches and computes the bits
of a run that never was. What is read ahead is lost with the process: the position that counts is that of training."""

import json
import signal
import subprocess
import sys
import time

import pytest

from slmjax.cli.verify import CLOCK, compare
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import steps

STEPS = 100
READERS = {
    "threads": ["--runtime.reader", "threads", "--runtime.reader.count", "3", "--runtime.reader.batches", "5"],
    "processes": ["--runtime.reader", "processes", "--runtime.reader.batches", "2"],
}


def start(tiny, folder, *more):
    command = [sys.executable, "-m", "slmjax.cli.main", "train", tiny.file, "--runtime.workdir", folder, *more]
    command += ["--runtime.data-dir", tiny.data_dir, "--runtime.tracking.wandb", "disabled", "--steps", STEPS]
    command += [
        "--evaluation.every",
        "20",
        "--runtime.checkpoints.every",
        "10",
        "--runtime.checkpoints.keep-last",
        "20",
    ]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def interrupt(process, folder, how):
    """Sends the signal once there is a newer checkpoint; returns the exit code.

    Its output ends when the last of its processes has: those that read ahead do not outlive it.
    """
    checkpoints = folder / "checkpoints"
    before = steps(checkpoints)
    while steps(checkpoints)[-1:] == before[-1:]:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=100)
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start(tiny, folder, *READERS["threads"]))
    return folder


@pytest.mark.parametrize(
    ("reader", "signals"),
    [
        ("threads", [signal.SIGTERM, signal.SIGKILL]),
        ("processes", [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]),
    ],
    ids=["threads, twice", "processes, three times"],
)
def test_interrupted_again_and_again(tiny, tmp_path, undisturbed, reader, signals):
    folder = tmp_path / "run"
    for how in signals:
        code = interrupt(start(tiny, folder, *READERS[reader]), folder, how)
        assert code == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    finished(start(tiny, folder, *READERS[reader]))

    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert len(resumed) == len(signals)
    assert resumed == sorted(set(resumed))  # each goes on later than the one before
    expected, got = (
        [{key: value for key, value in row.items() if key not in CLOCK} for row in read(run / "metrics.jsonl")]
        for run in (undisturbed, folder)
    )
    assert [row["batch"] for row in got] == [row["batch"] for row in expected]
    assert len({row["batch"] for row in got}) == STEPS  # no batch twice
    assert [repr(row) for row in got] == [repr(row) for row in expected]
    assert compare(undisturbed, folder, STEPS)[0] == []  # the arrays of the last checkpoint as well
