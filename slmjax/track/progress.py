"""Shows a run while it trains: a progress bar on a terminal, plain lines elsewhere, and `log.txt`."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from slmjax.track.tracker import Tracker

REFRESH = 0.25
"""Seconds between two redraws of the bar"""
LINE = 10.0
"""Seconds between two plain lines"""
VALIDATION = "validation/loss"


@runtime_checkable
class Stream(Protocol):
    """Where text goes: stderr, or an `io.StringIO`."""

    def write(self, text: str, /) -> Any: ...

    def flush(self) -> Any: ...


class Progress(Tracker):
    """A tracker that shows `loss`, `tokens_per_second`, `mfu` and `memory_bytes` of what is logged, and the time left.

    Nothing is drawn more often than every quarter of a second, so logging each of a thousand steps a second is fine.
    """

    def __init__(
        self, steps: int, log: str | Path | None = None, *, stream: Stream | None = None, line: float = LINE,
        name: str = "",
    ):  # fmt: skip
        """`steps` of the whole run; `log` is appended to; `stream` is stderr unless given; `name`: what lines on the
        stream begin with, in place of a bar, where several runs share it."""
        self.steps = steps
        self._stream = stream or sys.stderr
        self._log = Path(log).open("a", encoding="utf-8", buffering=1) if log else None  # noqa: SIM115
        self._lock = threading.RLock()
        self._interval = line
        self._metrics: dict[str, float] = {}
        self._step = self._evaluated = 0
        self._first: tuple[float, int] | None = None
        self._drawn = self._lined = -math.inf
        self._live: Any = None
        self._task: Any = None
        self._name = f"{name}: " if name else ""
        if not name and getattr(self._stream, "isatty", lambda: False)():
            self._live, self._task = _bar(steps, self._stream)
            self._live.start()

    def say(self, text: str) -> None:
        """A line that stays: above the bar, and in the log. From any thread."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(f"{self._name}{text}", file=self._stream, flush=True)
            self._write(text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._step = step
        self._metrics.update(metrics)
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        evaluated = VALIDATION in metrics
        if evaluated:
            self._evaluated = step
        line_due = evaluated or now - self._lined >= self._interval or step == self.steps
        if self._live is None and not line_due and not self._log:
            return
        if self._live is not None and now - self._drawn >= REFRESH:
            self._drawn = now
            with self._lock:
                self._live.update(self._task, completed=step, shown=self._latest(), eta=self._eta(now))
        if line_due:
            self._lined = now
            new = {name: x for name, x in self._metrics.items() if evaluated or name != VALIDATION}
            text = f"step {step}/{self.steps}  {describe(new)}  {self._eta(now)}".rstrip()
            with self._lock:
                if self._live is None:
                    print(f"{self._name}{text}", file=self._stream, flush=True)
                self._write(text)

    def _latest(self) -> str:
        """Text of the bar, which keeps showing the last validation loss, with its step."""
        return describe(self._metrics, self._evaluated)

    def _eta(self, now: float) -> str:
        first_time, first_step = self._first or (now, self._step)
        done, left = self._step - first_step, self.steps - self._step
        return f"{duration((now - first_time) / done * left)} left" if done > 0 and left > 0 else ""

    def _write(self, text: str) -> None:
        if self._log and not self._log.closed:
            self._log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {text}\n")

    def resume(self, step: int) -> None:
        self._step, self._first = step, None

    def finish(self, status: str) -> None:
        """Leaves the last state of the bar standing. Further lines still go to the stream."""
        with self._lock:
            if self._live is not None:
                self._live.update(self._task, completed=self._step, shown=self._latest(), eta=status)
                self._live.stop()
                self._live = None
            if self._log:
                self._write(status)
                self._log.close()


def _bar(steps: int, stream: Any):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TextColumn("{task.fields[eta]}", style="cyan", markup=False),
        console=Console(file=stream),
        refresh_per_second=1 / REFRESH,
    )
    return bar, bar.add_task("", total=steps, shown="compiling", eta="")


def describe(metrics: Mapping[str, float], evaluated: int | None = None) -> str:
    """The main metrics in one line; `evaluated` is the step of the validation loss, if it is to be shown."""
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if VALIDATION in metrics:
        of = "" if evaluated is None else f" (step {evaluated})"
        parts.append(f"validation {metrics[VALIDATION]:.4f}{of}")
    if "tokens_per_second" in metrics:
        parts.append(f"{si(metrics['tokens_per_second'])}tok/s")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    memory = metrics.get("memory_bytes") or _resident()
    parts.append(f"{memory / 2**30:.2f} GiB")
    return "  ".join(parts)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss


def si(value: float) -> str:
    """1234567 -> `1.23 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """3725 -> `1 h 02 min`."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
