"""The main verbs work where torch and transformers cannot be imported."""

import os
import subprocess
import sys

from running import runtime, store_of

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from slmjax.cli.main import run
for argv in {commands}:
    assert run(argv) == 0, argv
"""


def test_main_verbs_without_torch(tiny, tiny_run, tmp_path):
    run, out = str(tmp_path / "run"), str(tmp_path / "hf")
    commands = [
        ["train", str(tiny.file), *map(str, runtime(tiny, run))],
        ["eval", run, "--data", str(store_of(tiny)), "--batches", "2"],
        ["generate", run, "--prompt", "Call me", "--max-tokens", "4"],
        ["inspect", run],
        ["export", run, "--format", "hf", "--out", out],
        ["generate", out, "--prompt", "Call me", "--max-tokens", "4"],
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "SLMJAX_REFERENCE_PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(commands=commands)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
