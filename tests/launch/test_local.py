"""Several processes of one run on this machine: one is killed, all are told to stop, and they go on to the end."""

import os
import signal
import threading
import time

import psutil
import pytest
from running import runtime, slmjax

from slmjax.track.jsonl import read


@pytest.fixture
def one_device(monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("host_platform_device_count=8", "host_platform_device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)


def test_killed_stopped_and_run_to_the_end(tiny, tmp_path, one_device):
    others = set(psutil.Process().children())  # of earlier tests
    run = tmp_path / "run"
    words = ["launch", "local", tiny.file, "--processes", 2, "--", *runtime(tiny, run), "--steps", 80]
    words += ["--evaluation.every", 1000, "--runtime.checkpoints.every", 5, "--runtime.tracking.wandb", "disabled"]

    def rows():
        return len(read(run / "metrics.jsonl"))

    def launched(then, after):
        def act():
            while rows() <= after:
                time.sleep(0.02)
            then()

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        return slmjax(*words)

    def kill_the_second():
        ours = set(psutil.Process().children()) - others
        (second,) = (p for p in ours if p.cmdline()[-2:] == ["--runtime.distributed.index", "1"])
        second.kill()

    killed = launched(kill_the_second, 5)
    assert killed.code == 75, killed.err
    assert "process 1 ended with SIGKILL; the others end too" in killed.out
    assert "slmjax: error: process 1 ended with SIGKILL" in killed.err
    assert "run the same command again" in killed.err
    assert 5 < rows() < 80

    stopped = launched(lambda: os.kill(os.getpid(), signal.SIGTERM), rows() + 5)
    assert stopped.code == 75, stopped.err
    assert "the run is stopped and saved: run the same command again to go on" in stopped.err
    assert rows() < 80

    done = slmjax(*words)
    assert done.code == 0, done.err
    assert [row["step"] for row in read(run / "metrics.jsonl")] == list(range(1, 81))
    logs = tmp_path / "run.local"
    assert str(logs) in done.out
    assert [path.name for path in logs.iterdir()] == ["process-1.log"]
    assert not set(psutil.Process().children()) - others


def test_a_failure_is_told_with_its_code_and_reason(tiny, tmp_path, one_device):
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "thesis.txt").write_text("")
    done = slmjax("launch", "local", tiny.file, "--processes", 1, "--", *runtime(tiny, taken))
    assert done.code == 2
    assert "process 0 failed (exit code 2), for the reason above" in done.err
    refused = slmjax("launch", "local", tiny.file, "--processes", 0)
    assert refused.code == 2
    assert "--processes is 0; expected at least 1" in refused.err
