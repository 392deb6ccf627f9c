"""Seconds from `slmjax train` to its first step at workload B: with an empty compilation cache, and with a filled one.

python benchmarks/startup.py [--rounds 3]

The token store is built before the clock starts. Bars: 20 s cold, 8 s with the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = """
from slmjax.config import Evaluation, Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import Constant

def experiment():
    return Experiment(
        name="startup",
        model=llama(layers=4, width=256, heads=4, kv_heads=4, hidden=704, vocab=4096, context=256),
        data=PackedText(train=(Part(source={store!r}),), length=256, batch=16),
        schedule=Constant(peak_lr=1e-3), steps=2, evaluation=Evaluation(every=0),
    )
"""


def first_step(experiment: Path, run: Path, cache: Path) -> float:
    """Seconds until metrics.jsonl has a row."""
    command = [sys.executable, "-m", "slmjax.cli.main", "train", str(experiment), "--runtime.workdir", str(run)]
    command += ["--runtime.data-dir", str(run.parent / "data"), "--runtime.tracking.wandb", "offline"]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = run / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):
        if process.poll() not in (None, 0):
            raise SystemExit(f"training failed with exit code {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, store = ROOT / "data/recipes/english_classics.py", folder / "store"
        build = [sys.executable, "-m", "slmjax.cli.main", "data", "build", str(recipe), "--out", str(store)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        experiment = folder / "startup_experiment.py"
        experiment.write_text(EXPERIMENT.format(store=str(store)))
        for i in range(args.rounds):
            cache = folder / f"cache{i}"
            cold, warm = (first_step(experiment, folder / f"run{i}-{kind}", cache) for kind in ("cold", "warm"))
            print(
                f"round {i + 1}: cold {cold:.1f} s (bar 20), with the compilation cache {warm:.1f} s (bar 8)",
                flush=True,
            )


if __name__ == "__main__":
    main()
