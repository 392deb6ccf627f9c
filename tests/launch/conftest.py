import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch.cluster import Cluster, install
from running import EXPERIMENT, ROOT, slmjax

SWEEP = """
from dataclasses import replace

from slmjax.sweeps.cells import Sweep
from slmjax.sweeps.making import grid


def base(steps):
    small = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=384, context=64)
    return replace(experiment(), model=small, evaluation=Evaluation(every=100_000, batches=1), steps=steps)


def several():
    return Sweep(name="several", cells=grid(base(20), seed=(0, 1, 2)))


def long():
    return Sweep(name="long", cells=grid(base(1000), seed=(0,)))
"""


@pytest.fixture(scope="session")
def sweeps(tiny, tmp_path_factory):
    """`plan(name, out)`: a planned sweep of that function of the file."""
    file = tmp_path_factory.mktemp("launch") / "cluster_sweeps.py"
    file.write_text(EXPERIMENT.format(text=tiny.text) + SWEEP)

    def plan(name, out):
        done = slmjax("sweep", "plan", f"{file}:{name}", "--out", out, "--data-dir", tiny.data_dir)
        assert done.code == 0, done.err
        return out

    return SimpleNamespace(file=file, plan=plan)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real SLURM of three nodes. Without root, or where apt-get has no SLURM, its tests fail: CONTRIBUTING.md says
    how to leave them out."""
    assert os.geteuid() == 0, "these tests start a SLURM of their own, which needs root; leave them out: -m 'not slurm'"
    install()
    cluster = Cluster(Path(tmp_path_factory.mktemp("slurm")))
    # One device a process; the nodes share the compilation cache.
    flags = os.environ["XLA_FLAGS"].replace("host_platform_device_count=8", "host_platform_device_count=1")
    before = dict(os.environ)
    os.environ.update(SLURM_CONF=str(cluster.at / "slurm.conf"), XLA_FLAGS=flags, PYTHONPATH=str(ROOT))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ.update(before)
