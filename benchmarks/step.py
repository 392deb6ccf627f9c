"""slmjax's training step against PyTorch's, alternating in one run.

python benchmarks/step.py --reference-python PATH [--workloads A B] [--rounds 6] [--isa avx2]

PATH is a Python that has torch and transformers. Both sides start from the same parameters and see the same batches.
All processes stay alive and take turns of a few steps, so that a change of the machine's speed meets every one of them;
the table gives medians, and the ratio to PyTorch's fastest variant is the median over rounds. `cpu s` is the processor
time of a step, summed over cores: on a machine that others use at the same time it drifts less than tokens/s, though
PyTorch's threads spend some of it waiting for one another.

--isa avx2 emulates a processor without AVX-512 and AMX, on one that has them, as far as each library can
be configured to. PyTorch, MKL and oneDNN do so entirely. slmjax then chooses by the features that are left, so
float32, and XLA generates AVX2 code; but the matrix products of jaxlib 0.12 ask the processor itself, and keep AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import workload as w

from slmjax.nn.processor import processor

HERE = pathlib.Path(__file__).resolve().parent
PEERS = {
    "torch float32": ["--dtype", "float32"],
    "torch bfloat16": ["--dtype", "bfloat16"],
    "torch float32 compiled": ["--dtype", "float32", "--compile"],
    "torch bfloat16 compiled": ["--dtype", "bfloat16", "--compile"],
}
ISA = {
    "avx2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""Environment in which a library leaves the later instructions of the processor alone"""
CEILING = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
for dtype in (torch.bfloat16, torch.float32):
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best, end = 1e9, time.time() + 1.5
    while time.time() < end:
        start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)
    print(2 * 2048**3 / best)
"""


class Side:
    """One process that trains on request."""

    def __init__(self, command: list[str]):
        self.seconds: list[list[float]] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
        self.first = self._answer()["seconds"][0]

    def run(self, steps: int) -> None:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.cpu += answer["cpu"]

    def close(self) -> None:
        self.process.communicate("\n")

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended early")  # pyright: ignore
        answer = json.loads(line)
        self.losses += answer["losses"]
        self.peak_mib = answer["peak_mib"]
        return answer


def jax_ceiling() -> list[float]:
    """FLOP/s of a 2048-cubed product in JAX, bf16 and fp32."""
    import jax
    import jax.numpy as jnp

    dot, found = jax.jit(jnp.dot), []
    for dtype in (jnp.bfloat16, jnp.float32):
        x, best, end = jnp.ones((2048, 2048), dtype), 1e9, time.time() + 1.5
        dot(x, x).block_until_ready()
        while time.time() < end:
            start = time.perf_counter()
            dot(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
        found.append(2 * 2048**3 / best)
    return found


def ceilings(python: str, cores: int) -> dict[str, float]:
    """The fastest matrix product that either library manages, FLOP/s."""
    lines = subprocess.run([python, "-c", CEILING, str(cores)], capture_output=True, text=True, check=True).stdout
    torch = [float(x) for x in lines.split()]
    return dict(zip(("bf16", "fp32"), map(max, torch, jax_ceiling()), strict=True))


def compare(name: str, python: str, rounds: int, steps: int, peers: list[str], ceiling: dict[str, float]) -> None:
    """Measures one workload and prints its table."""
    work = w.WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        common = ["--workload", name, "--init", folder]
        sides = {
            "slmjax": Side([sys.executable, "slmjax_step.py", *common])
        }  # writes the parameters that all start from
        for peer in peers:
            sides[peer] = Side([python, "torch_step.py", *common, *PEERS[peer]])
    for _ in range(rounds):
        for side in sides.values():
            side.run(steps)
    for side in sides.values():
        side.close()

    each = {label: [min(block) for block in side.seconds] for label, side in sides.items()}
    rate = {label: work.tokens / statistics.median(x) for label, x in each.items()}
    best = max(peers, key=rate.__getitem__)
    ratio = statistics.median(theirs / ours for theirs, ours in zip(each[best], each["slmjax"], strict=True))
    print(f"\nWorkload {name}: {work.parameters / 1e6:.1f}M parameters, {work.tokens} tokens a step, {rounds} rounds")
    print(f"{'':26}{'tokens/s':>9}{'of bf16':>9}{'of fp32':>9}{'cpu s':>8}{'peak MiB':>10}{'first s':>9}{'loss':>18}")
    for label, side in sides.items():
        share = [work.flops * rate[label] / work.tokens / ceiling[kind] for kind in ("bf16", "fp32")]
        print(
            f"{label:26}{rate[label]:9.0f}{share[0]:9.2f}{share[1]:9.2f}{statistics.median(side.cpu):8.3f}"
            f"{side.peak_mib:10.0f}{side.first:9.1f}{side.losses[0]:9.4f}{side.losses[-1]:9.4f}"
        )
    print(f"ratio to {best}: {ratio:.2f}x tokens/s, {sides['slmjax'].peak_mib / sides[best].peak_mib:.2f}x peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", required=True, type=os.path.abspath)
    parser.add_argument("--workloads", nargs="+", choices=sorted(w.WORKLOADS), default=sorted(w.WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn; the fastest of a turn counts")
    parser.add_argument("--isa", choices=sorted(ISA), help="emulate a processor without later instructions")
    args = parser.parse_args()
    given = os.environ.get("XLA_FLAGS", "")
    os.environ.update(ISA.get(args.isa, {}))
    os.environ["XLA_FLAGS"] = f"{given} {ISA[args.isa]['XLA_FLAGS']}" if args.isa else given
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what another processor compiled may crash on this one
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Prints the processor, the ceilings and a table for each workload."""
    where = processor("")  # all that it has
    print(f"{where}{f'; emulated: {args.isa}' if args.isa else ''}")
    ceiling = ceilings(args.reference_python, len(os.sched_getaffinity(0)))
    print("matmul ceiling, GFLOP/s: " + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in ceiling.items()))
    for name in args.workloads:
        compare(name, args.reference_python, args.rounds, args.steps, args.peers, ceiling)


if __name__ == "__main__":
    main()
