"""Two real processes that talk over the loopback: they train as one does, and stop and save together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from train import toy

from slmjax.train import checkpoint_folder, loop
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Skip

TESTS = Path(__file__).parent.parent

PROCESS = """
import json, os, pathlib, signal, sys

rank, port, folder, stop_at = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank, heartbeat_timeout_seconds=20)
from train import toy
from slmjax.errors import Preempted
from slmjax.train import loop
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Skip
from slmjax.train.hooks import Evaluate
from slmjax.train.sharding import Mesh

class Half(toy.Data):
    def __next__(self):
        if self.next == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return half(super().__next__())

def half(batch):
    return jax.tree.map(lambda x: x[4 * rank : 4 * rank + 4], batch)

tracker, said, code = toy.Tracker(), [], 0
try:
    loop.train(loop.Job(
        program=toy.program(Mesh(data=2, fsdp=2), jax.devices()), data=Half(), steps=10, workdir=folder,
        tracker=tracker, guard=Skip(), checkpoints=Checkpoints(every=4, best="validation/loss"), say=said.append,
        hooks=(Evaluate(every=5, batches=lambda: [half(toy.batch(100))]),),
    ))
except Preempted as stopped:
    said.append(str(stopped))
    code = stopped.code
print(json.dumps({"rows": tracker.rows, "said": said, "code": code, "status": tracker.status}), flush=True)
jax.distributed.shutdown()
"""


def run(folder, stop_at=-1):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(TESTS),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(folder), str(stop_at)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    out = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-3000:]
        out.append(json.loads(stdout.splitlines()[-1]))
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    tracker = toy.Tracker()
    loop.train(loop.Job(
        program=toy.program(), data=toy.Data(), steps=10, workdir=tmp_path_factory.mktemp("one"), tracker=tracker,
        guard=Skip(), checkpoints=Checkpoints(),
    ))  # fmt: skip
    return tracker.rows


def test_two_processes_stop_together_and_go_on_as_one_would(tmp_path, one):
    """SIGTERM reaches rank 1 alone while it reads its 4th batch. Both save the same step; started again, they end with
    the losses of one process that was left alone; and one process reads what two have written."""
    first, second = run(tmp_path, stop_at=3)
    assert (first["code"], second["code"]) == (75, 75)
    (step,) = checkpoint_folder.steps(tmp_path / "checkpoints")
    assert step in (4, 5)
    assert f"stopped by another process after step {step}" in first["said"][-1]
    assert f"stopped by SIGTERM after step {step}" in second["said"][-1]
    assert not second["rows"]  # only rank 0 reports

    again, _ = run(tmp_path)
    assert again["said"] == [f"resumed after step {step} of 10"]
    rows = {int(s): row for s, row in (first["rows"] | again["rows"]).items()}
    assert sorted(rows) == list(range(1, 11))
    for s, row in rows.items():
        for name in ("loss", "grad_norm", "param_norm", "weight", "tokens"):
            np.testing.assert_allclose(row[name], one[s][name], rtol=1e-4, err_msg=f"{name} of step {s}")
    assert "validation/loss" in rows[5]
    assert again["status"] == "complete"

    program = toy.program()
    restored = checkpoint_folder.restore(tmp_path / "checkpoints", 10, program.abstract)
    assert int(restored.state.step) == 10
    norm = float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(restored.state.params))))
    np.testing.assert_allclose(norm, one[10]["param_norm"], rtol=1e-5)
