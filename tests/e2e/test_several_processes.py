"""`slmjax train` in two processes over the loopback: the numbers of one, and an end for all when one ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from running import ROOT, runtime, slmjax

from slmjax.track.jsonl import read
from slmjax.track.ledger import state_of
from slmjax.train.checkpoint_folder import steps

STEPS = 60


def start(tiny, folder, *more, devices=1):
    """One process with its own devices."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    fixed = ["--steps", STEPS, "--evaluation.every", 30, "--runtime.checkpoints.every", 10]
    fixed += ["--runtime.tracking.wandb", "disabled"]
    words = map(str, ["train", tiny.file, *runtime(tiny, folder), *fixed, *more])
    return subprocess.Popen(
        [sys.executable, "-m", "slmjax.cli.main", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_two(tiny, folder, *more, second=()):
    """Both processes; `second` is what the other one gets besides."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = ["--runtime.distributed", "processes", "--runtime.distributed.coordinator", f"127.0.0.1:{port}"]
    both += ["--runtime.distributed.count", 2, "--runtime.distributed.index"]
    return [start(tiny, folder, *more, *both, 0), start(tiny, folder, *more, *both, 1, *second)]


def ended(process):
    """-> exit code, stdout, stderr; it must not hang."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def mistakes(err):
    return [line for line in err.splitlines() if line.startswith("slmjax: error")]


def check_rows(folder, one):
    """Every step once, with the data of the run of one process, and its numbers but for rounding."""
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["batch"] for row in rows] == [row["batch"] for row in one]
    for name in ("loss", "grad_norm", "tokens", "epoch"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in one], rtol=2e-2, err_msg=name)
    for name in ("validation/loss", "validation/weight"):
        got, expected = ([row[name] for row in which if name in row] for which in (rows, one))
        np.testing.assert_allclose(got, expected, rtol=1e-2, err_msg=name)
    np.testing.assert_allclose([r["loss"] for r in rows[:20]], [r["loss"] for r in one[:20]], rtol=1e-4)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """The rows of one process with two devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    code, _, err = ended(start(tiny, folder, "--runtime.dtype", "float32", devices=2))
    assert code == 0, err
    return read(folder / "metrics.jsonl")


def test_one_of_two_is_killed_and_both_or_one_alone_go_on(tiny, tmp_path, one):
    run, alone = tmp_path / "run", tmp_path / "alone"
    first, second = start_two(tiny, run, "--runtime.dtype", "float32")
    while 10 not in steps(run / "checkpoints"):
        assert first.poll() is None, ended(first)
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    code, _, err = ended(first)
    ended(second)
    (said,) = mistakes(err)
    assert code == 75
    assert "lost another process" in said
    assert "Traceback" not in err
    assert state_of(read(run / "ledger.jsonl")) == "failed"
    shutil.copytree(run, alone)

    pair = [ended(process) for process in start_two(tiny, run, "--runtime.dtype", "float32")]
    assert [code for code, _, _ in pair] == [0, 0], pair
    assert "resumed after step " in pair[0][2]
    assert "done: " in pair[0][1]
    assert "step" not in pair[1][1] + pair[1][2]  # the first one speaks for both
    check_rows(run, one)
    assert state_of(read(run / "ledger.jsonl")) == "complete"

    code, _, err = ended(start(tiny, alone, "--runtime.dtype", "float32", devices=2))
    assert code == 0, err
    assert "resumed after step " in err
    check_rows(alone, one)


@pytest.mark.parametrize(("index", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_who_is_aborted_by_jax_says_why_last(tiny, tmp_path, index, number):
    """Process 0 holds the coordination service; one that is stopped closes no connection: JAX aborts the other."""
    run = tmp_path / "run"
    beat = ["--runtime.distributed.heartbeat", 20]  # less is missed where the machine is busy
    pair = start_two(tiny, run, "--steps", 100_000, *beat)
    while 10 not in steps(run / "checkpoints"):
        assert pair[0].poll() is None, ended(pair[0])
        time.sleep(0.01)
    pair[index].send_signal(number)
    code, _, err = ended(pair[1 - index])
    pair[index].kill()
    ended(pair[index])
    (said,) = mistakes(err)
    assert code == 75
    assert err.splitlines()[-1] == said
    assert "lost another process" in said
    assert "start all of them again" in said


@pytest.mark.parametrize(
    ("both", "second", "failed", "words"),
    [
        ([], ["--seed", "1"], 1, "process 1 has another experiment"),
        (["--runtime.workdir", "{taken}"], [], 0, "not a run folder"),
        (["--runtime.mesh.tensor", "2", "--runtime.mesh.data", "1"], [], None, "keep tensor within a process"),
    ],
    ids=["another experiment", "folder taken", "tensor across processes"],
)
def test_a_mistake_of_one_ends_both_in_one_line(tiny, tmp_path, both, second, failed, words):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("")
    both = [word.format(taken=taken) for word in both]
    for index, (code, _, err) in enumerate(map(ended, start_two(tiny, tmp_path / "run", *both, second=second))):
        assert code == 2, err
        (said,) = mistakes(err)
        assert words in said
        assert "Traceback" not in err
        if failed is not None:
            assert (f"process {failed} failed" in said) == (index != failed)


def test_who_waits_in_vain_says_so(tiny, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{s.getsockname()[1]}"
    where = ["--runtime.distributed", "processes", "--runtime.distributed.coordinator", at]
    where += ["--runtime.distributed.count", 2, "--runtime.distributed.timeout", 2, "--runtime.distributed.index"]
    processes = [start(tiny, tmp_path / "run", *where, 1)]
    processes.append(start(tiny, tmp_path / "run", "--runtime.distributed", "cluster"))
    for process, words in zip(
        processes, (f"coordinator {at}, did not connect to the others within 2 s", "srun"), strict=True
    ):
        code, _, err = ended(process)
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert words in err
    assert not (tmp_path / "run").exists()


def test_an_experiment_that_computes_too_early_is_told(tiny, tmp_path):
    early = tmp_path / "early_experiment.py"
    early.write_text(f"import jax.numpy as jnp\nONE = jnp.ones(1)\n{tiny.file.read_text()}")
    where = ["--runtime.distributed", "processes", "--runtime.distributed.coordinator", "127.0.0.1:1"]
    where += ["--runtime.distributed.count", "2", "--runtime.distributed.index", "1"]
    refused = slmjax("train", early, *where)
    assert refused.code == 2
    assert "computes with JAX while it is imported" in refused.err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"index": 2}, ["index 2", "count 2"]),
        ({"count": 0, "index": 0}, ["count 0"]),
        ({"coordinator": "10.0.0.1"}, ["'10.0.0.1'", "host:port"]),
        ({"coordinator": "no such host:1234"}, ["'no such host:1234'", "unknown here"]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(tiny, fields, words):
    given = {"coordinator": "127.0.0.1:1234", "count": 2, "index": 0, **fields}
    flags = [word for name, x in given.items() for word in (f"--runtime.distributed.{name}", str(x))]
    refused = slmjax("train", tiny.file, "--runtime.distributed", "processes", *flags)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    for word in words:
        assert word in refused.err


def test_an_unknown_kind_is_refused_and_the_fields_are_listed(tiny):
    refused = slmjax("train", tiny.file, "--runtime.distributed", "processess")
    assert (refused.code, "did you mean 'processes'" in refused.err) == (2, True)
    listed = slmjax("train", tiny.file, "--runtime.distributed", "processes", "--help")
    assert listed.code == 0
    assert "--runtime.distributed.coordinator" in listed.out
