"""The loss along a run, from its learning rates: the multi-power law (Luo et al. 2025, arXiv:2503.12811).

L(t) = L0 + A S(t)^-alpha + B sum over k <= t of (lr_k - lr_(k-1)) (1 - (1 + C lr_k^-gamma (S(t) - S(k-1)))^-beta)

S(t) is the sum of learning rates to step t. Fitted to a few schedules, it predicts the curves of others.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from slmjax.errors import DataError
from slmjax.scaling.law import Columns
from slmjax.scaling.quantity import Parameter
from slmjax.scaling.starts import nonnegative


@dataclass(frozen=True, eq=False)
class Schedule:
    """
    Attributes:
        lr: learning rates of every step, [T], warm-up included.
        block: how many steps' changes of the learning rate are taken together; 1 is exact, and slow.
    """

    lr: np.ndarray
    block: int = 16

    @cached_property
    def total(self) -> np.ndarray:
        """S(t), [T]."""
        return np.cumsum(self.lr)

    @cached_property
    def changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the learning rate changes, in blocks of steps: the last step of each, the change, ln of the learning
        rate, S before it, each [k]."""
        gap = np.diff(self.lr)
        steps = np.flatnonzero(gap) + 1
        if not len(steps):
            return np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0)
        starts = np.flatnonzero(np.diff(steps // self.block, prepend=-1))
        count = np.diff(starts, append=len(steps))

        def mean(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts) / count

        change = np.add.reduceat(gap[steps - 1], starts)
        return steps[starts + count - 1], change, mean(np.log(self.lr[steps])), mean(self.total[steps - 1])


@dataclass(frozen=True, eq=False)
class Curve:
    """A run's losses [m] at steps [m] of its schedule."""

    schedule: Schedule
    step: np.ndarray
    loss: np.ndarray


def read_curve(path: str | Path, warmup: int = 0) -> Curve:
    """Reads a CSV with columns step, lr, loss, a line for each measured step; an empty loss is a step to come. Between
    lines the learning rate is interpolated; before the first one it has risen evenly from 0 over `warmup` steps.

    Raises:
        DataError: a column is missing, or no number, or steps do not rise.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"step", "lr", "loss"} <= rows[0].keys():
        raise DataError(f"{path}: expected the columns step, lr, loss, and a line for each measured step")
    try:
        step, lr, loss = (
            np.asarray([float(row[name] or ("nan" if name == "loss" else "")) for row in rows])
            for name in ("step", "lr", "loss")
        )
    except (TypeError, ValueError):
        raise DataError(f"{path}: step, lr and loss have to be numbers in every line") from None
    known = ~np.isnan(loss)
    if not (np.diff(step) > 0).all() or not (np.stack([step, lr]) > 0).all() or not (loss[known] > 0).all():
        raise DataError(f"{path}: steps have to rise, and steps, learning rates and losses to be positive")
    every = np.interp(np.arange(int(step[-1]) + 1), step, lr)
    every[:warmup] = np.linspace(0, lr[0], warmup)
    return Curve(Schedule(every), step[known].astype(int), loss[known])


@dataclass(frozen=True, eq=False)
class MultiPower:
    """The law, for runs of these schedules: its columns are the number of a schedule, and a step."""

    schedules: tuple[Schedule, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        exponents = [Parameter(name, low=1e-3, high=3.0) for name in ("alpha", "beta", "gamma")]
        logs = [Parameter(name, log=True) for name in ("L0", "A", "B", "C")]
        return (*logs[:2], exponents[0], *logs[2:], *exponents[1:])

    @property
    def columns(self) -> tuple[str, ...]:
        return ("schedule", "step")

    def log_loss(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        log, jacobian = zip(*(self._one(t, columns) for t in theta), strict=True)
        return np.stack(log), np.stack(jacobian)

    def _one(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        (floor, a, b), alpha = np.exp(theta[[0, 1, 3]]), theta[2]
        log_s, dropped = self._sums(theta[4], theta[5], theta[6], columns)
        power = a * np.exp(-alpha * log_s)
        # Far from the optimum the sum may be negative, and has no logarithm; such a step is refused as too far off.
        loss = np.maximum(floor + power + b * dropped[0], 1e-10)
        by = [np.full_like(loss, floor), power, -power * log_s, b * dropped[0], *(b * d for d in dropped[1:])]
        return np.log(loss), np.stack(by, -1) / loss[:, None]

    def _sums(self, log_c: float, beta: float, gamma: float, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """ln S [n]; and the sum over changes of the learning rate with its derivatives by ln C, beta, gamma, [4, n]."""
        log_s, out = np.empty(len(columns["step"])), np.zeros((4, len(columns["step"])))
        for number, schedule in enumerate(self.schedules):
            mine = np.flatnonzero(columns["schedule"] == number)
            steps = columns["step"][mine].astype(int)
            total = schedule.total[steps]
            log_s[mine] = np.log(total)
            last, change, log_lr, before = schedule.changes
            if not len(last):
                continue
            since = np.maximum(total[:, None] - before, 0.0) * (last <= steps[:, None])
            log_u = log_c - gamma * log_lr
            u = np.exp(log_u) * since
            log_1u = np.log1p(u)
            rest = np.exp(-beta * log_1u)
            by_c = beta * rest * u / (1 + u)
            for row, part in enumerate((1 - rest, by_c, rest * log_1u, -by_c * log_lr)):
                out[row, mine] = (part * (since > 0)) @ change
        return log_s, out

    def starts(self, columns: Columns) -> np.ndarray:
        """[9, 7]: three floors and three alpha, C = 2 and beta = gamma = 0.6; A and B by least squares."""
        loss = columns["loss"]
        log_s, dropped = self._sums(math.log(2.0), 0.6, 0.6, columns)
        out = []
        for share, alpha in itertools.product((0.8, 0.9, 0.97), (0.3, 0.5, 0.7)):
            floor = share * float(loss.min())
            matrix = np.stack([np.exp(-alpha * log_s), dropped[0]], -1)[None]
            a, b = nonnegative(matrix, loss - floor, np.ones((1, len(loss))))[0]
            logs = [math.log(floor), math.log(max(a, 1e-3)), math.log(max(b, 1.0)), math.log(2.0)]
            out.append([*logs[:2], alpha, *logs[2:], 0.6, 0.6])
        return np.asarray(out)


def together(curves: Sequence[Curve]) -> tuple[MultiPower, dict[str, np.ndarray]]:
    """The law of several curves, and their points as columns for `fit`."""
    law = MultiPower(tuple(curve.schedule for curve in curves))
    number = np.repeat(np.arange(len(curves)), [len(curve.step) for curve in curves])
    step = np.concatenate([curve.step for curve in curves])
    return law, {"schedule": number, "step": step, "loss": np.concatenate([curve.loss for curve in curves])}
