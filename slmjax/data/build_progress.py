"""Shows on stderr how far the build of a token store is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from slmjax.data.work import Progress

LINE_SECONDS = 5.0
"""Seconds between plain progress lines of one stage"""


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """A function that shows the stages of a build on stderr: bars on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def bar(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield bar


class _Lines:
    """Progress where stderr is not a terminal: a line when a stage ends, and every few seconds within one."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        self._last.setdefault(stage, now)
        if done == total or now - self._last[stage] >= LINE_SECONDS:
            self._last[stage] = now
            print(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""), file=sys.stderr, flush=True)
