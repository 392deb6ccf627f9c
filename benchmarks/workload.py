"""The two training configurations of the step benchmark and its data. Needs numpy only: both sides import it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A Llama with tied embeddings, and the batch it trains on."""

    width: int
    layers: int
    heads: int
    hidden: int
    vocab: int
    length: int
    batch: int

    @property
    def parameters(self) -> int:
        block = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        return self.vocab * self.width + self.layers * block + self.width

    @property
    def tokens(self) -> int:
        """Tokens a step"""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Training FLOPs a step: 6 for each parameter and token, and 12·L·S·D a token for the attention scores
        (Chowdhery et al. 2022, appendix B, arXiv:2204.02311), which counts the masked half as well."""
        return self.tokens * (6.0 * self.parameters + 12.0 * self.layers * self.length * self.width)


WORKLOADS = {
    "A": Workload(width=512, layers=8, heads=8, hidden=1408, vocab=8192, length=512, batch=8),
    "B": Workload(width=256, layers=4, heads=4, hidden=704, vocab=4096, length=256, batch=16),
}

PEAK_LR, WEIGHT_DECAY, BETAS, EPS, CLIP_NORM = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
"""Constant learning rate; matrices decay, norm gains do not. The same on both sides."""


def tokens(workload: Workload, steps: int, seed: int = 0) -> np.ndarray:
    """[steps, B, T + 1] int32: a random walk over the vocabulary in which one of 32 successors follows each token,
    so that a model has something to learn and the loss of both sides falls."""
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, workload.vocab, (workload.vocab, 32))
    out = np.empty((steps, workload.batch, workload.length + 1), np.int32)
    out[..., 0] = rng.integers(0, workload.vocab, out.shape[:2])
    for t in range(workload.length):
        out[..., t + 1] = successors[out[..., t], rng.integers(0, 32, out.shape[:2])]
    return out


def peak_mib() -> float:
    """The largest resident set of this process so far, MiB."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def serve(step: Callable[[np.ndarray], float], data: np.ndarray) -> None:
    """Runs training steps on request: a line `n` on stdin runs n of them and answers one line of JSON.

    `step` takes [B, T + 1] tokens and returns the loss once the step is done. Its first call compiles, so the first
    line (which answers with that call) tells the seconds it took. An empty line or end of input ends the process.
    """
    done, losses = 0, []
    line = "1"
    while line.strip():
        seconds, cpu = [], []
        for _ in range(int(line)):
            start, worked = time.perf_counter(), time.process_time()
            losses.append(step(data[done % len(data)]))
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - worked)
            done += 1
        answer = {"seconds": seconds, "cpu": cpu, "losses": losses[-len(seconds) :], "peak_mib": peak_mib()}
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
