"""Every benchmark, one after the other: `make bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference-python", required=True, help="a Python that has torch and transformers")
    args = parser.parse_args()
    peers = ["--reference-python", args.reference_python]
    for name, arguments in {
        "step.py": peers,
        "generate.py": peers,
        "data.py": [],
        "startup.py": [],
        "convert.py": [],
        "overhead.py": [],
        "quantize.py": [],
        "distill.py": [],
        "fit.py": [],
        "population.py": [],
        "scaling.py": [],
    }.items():
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, str(HERE / name), *arguments], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
