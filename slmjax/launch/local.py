"""One training run in several processes of this machine, which talk over the loopback."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slmjax import signals
from slmjax.errors import Preempted, UserError

POLL = 0.1
"""Seconds between looks at the processes"""
AFTER = 90.0
"""Seconds that the others have to end once one has: three times the heartbeat by which they notice"""


class Died(UserError):
    """A process of the run was killed, or lost another one."""

    code = 75


def train(words: Sequence[str], count: int, logs: Path, say: Callable[[str], None] = print) -> None:
    """Runs `slmjax train` in `count` processes, and returns when all have ended well. The first one writes to this
    process's terminal, the others to `logs`/process-N.log. Signals are passed on; a second Ctrl-C ends them at once.

    Args:
        words: the experiment and its options.

    Raises:
        UserError: fewer than one process; or one failed: with its exit code, and the end of its log.
        Died: one was killed; the others have ended too.
        Preempted: stopped by a signal; the run is saved.
    """
    if count < 1:
        raise UserError(f"--processes is {count}; expected at least 1")
    at = f"127.0.0.1:{_free_port()}"
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen] = []
    with signals.noted() as received, contextlib.ExitStack() as files:
        try:
            for index in range(count):
                out = files.enter_context(log_of(logs, index).open("wb")) if index else None
                # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
                processes.append(
                    subprocess.Popen(
                        _command(words, at, count, index), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                        start_new_session=True,
                    )
                )  # fmt: skip
            first = _watch(processes, received, say)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    _verdict(processes, first, logs, received)


def log_of(logs: Path, index: int) -> Path:
    return logs / f"process-{index}.log"


def _command(words: Sequence[str], at: str, count: int, index: int) -> list[str]:
    given = {"coordinator": at, "count": count, "index": index}
    more = [part for name, value in given.items() for part in (f"--runtime.distributed.{name}", str(value))]
    start = [sys.executable, "-m", "slmjax.cli.main", "train", *words]
    return start if count == 1 else [*start, "--runtime.distributed", "processes", *more]


def _watch(processes: Sequence[subprocess.Popen], received: list[int], say: Callable[[str], None]) -> int | None:
    """Until all have ended -> the index of the one that ended badly first, if any."""
    first, told, last = None, 0, float("inf")
    while any(process.poll() is None for process in processes):
        for number in received[told:]:
            for process in processes:
                process.send_signal(number)
            told += 1
        if first is None and (bad := [i for i, process in enumerate(processes) if process.poll()]):
            first, last = bad[0], time.monotonic() + AFTER
            if not received:
                say(f"process {first} ended with {_why(processes[first].returncode)}; the others end too")
        if time.monotonic() > last:
            for process in processes:
                process.kill()
        time.sleep(POLL)
    bad = [i for i, process in enumerate(processes) if process.returncode]
    return first if first is not None else next(iter(bad), None)


def _verdict(processes: Sequence[subprocess.Popen], first: int | None, logs: Path, received: list[int]) -> None:
    if first is None:
        return
    code = processes[first].returncode
    ends = {0, Preempted.code, 130}
    if received and {process.returncode for process in processes} <= ends:
        stopped = Preempted("the run is stopped and saved: run the same command again to go on")
        stopped.code = code
        raise stopped
    if received and {process.returncode for process in processes} <= ends | {-number for number in received}:
        raise Preempted("stopped before the training began: run the same command again")
    text = log_of(logs, first).read_text("utf-8", errors="replace").splitlines() if first else []
    said = next((line.strip() for line in reversed(text) if line.strip()), "")
    if code < 0 or code == Died.code:
        raise Died(
            f"process {first} ended with {_why(code)}{f': {said}' if said else ''}; run the same command again: it "
            "goes on from the last checkpoint"
        )
    failed = UserError(f"process {first} failed ({_why(code)}){f': {said}' if said else ', for the reason above'}")
    failed.code = code
    raise failed


def _why(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
