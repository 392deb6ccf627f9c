"""Time and peak memory of `slmjax import` and `slmjax export` on a SmolLM2-135M with random weights.

python benchmarks/convert.py [--rounds 3] [--folder FOLDER]

Each command runs in a process of its own; its peak resident memory is compared with the size of the float32 weights.
Bars: 10 s, 2.2 times the weights. An export includes its check: logits of what was read back and of the model in
memory. Stock transformers, which would run in another process, is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE = """
import pathlib, sys
import numpy as np
from slmjax.convert.hf import abstract, write_hf
from slmjax.models.families.llama import smollm2_135m
from slmjax.tree import map_with_path

rng, decoder = np.random.default_rng(0), smollm2_135m()
draw = lambda _, x: 0.02 * rng.standard_normal(x.shape, np.float32)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
write_hf(folder, decoder, map_with_path(draw, abstract(decoder)))
"""
RUN = "import sys; from slmjax.cli.main import run; run(sys.argv[1:])"
# This process stays small: a child's ru_maxrss starts at its parent's.
PEAK = "; import resource; r = resource.getrusage(resource.RUSAGE_SELF)"
PEAK += "; print('used', r.ru_utime + r.ru_stime, r.ru_maxrss * 1024)"


def measure(code: str, *arguments: str) -> tuple[float, float, int]:
    """(seconds, seconds of processors, peak bytes) of a Python program."""
    environment = {k: v for k, v in os.environ.items() if k != "SLMJAX_REFERENCE_PYTHON"}
    start = time.perf_counter()
    command = [sys.executable, "-c", code + PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    busy, peak = done.stdout.split("used")[-1].split()
    return seconds, float(busy), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write, 0.6 GB and 1.1 GB a round; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source = Path(name, "source")
        subprocess.run([sys.executable, "-c", MAKE, str(source)], check=True)
        size = (source / "model.safetensors").stat().st_size
        *_, base = measure("import jax; jax.numpy.zeros(1)")
        print(f"float32 weights {size / 1e6:.0f} MB; a process that has imported jax {base / 1e6:.0f} MB")
        print("| command | seconds | CPU seconds | peak MB | times the weights |\n|---|---|---|---|---|")
        for i in range(args.rounds):
            imported, exported = Path(name, f"imported{i}"), Path(name, f"exported{i}")
            for verb, read, out in (("import", source, imported), ("export", imported, exported)):
                seconds, busy, peak = measure(RUN, verb, str(read), "--out", str(out))
                cells = f"{seconds:.1f} | {busy:.1f} | {peak / 1e6:.0f} | {peak / size:.2f}"
                print(f"| `slmjax {verb}` | {cells} |", flush=True)


if __name__ == "__main__":
    main()
