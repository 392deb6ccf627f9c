"""Runs the cells of a sweep that are not complete, in processes of their own: those of one shape together in one.

Several processes may work on one folder, on several machines: a cell is theirs that holds its lock file and the lease
beside it (`slmjax.lease`), which is free when they die. A cell's own process also holds its run folder (`train.lock`).
So a cell whose sweep process was killed goes on, and is left alone until it ends. But a job that a scheduler starts
again takes over the cells of its earlier start.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from slmjax import signals
from slmjax.errors import Diverged, Preempted, UserError
from slmjax.lease import Lease, held, lease
from slmjax.sweeps import grouping
from slmjax.sweeps.folder import ENDED, Folder, Planned, State, ready
from slmjax.sweeps.watching import Watch
from slmjax.track.jsonl import read
from slmjax.track.ledger import state_of
from slmjax.track.progress import duration

POLL, LOOK = 0.1, 1.0
"""Seconds between looks at the processes of this one, and at the folder"""
GRACE = 120.0
"""Seconds that a run has to save a checkpoint when it is told to stop"""


class _Taken(UserError):
    """Another process runs the cell."""


@dataclass
class _Running:
    cells: list[Planned]
    process: subprocess.Popen
    claim: contextlib.ExitStack
    leases: list[Lease]
    """One of each cell"""
    begun: float


def run(
    folder: Folder,
    *,
    workers: int = 1,
    population: int | None = None,
    until: float | None = None,
    options: Sequence[str] = (),
    wait: bool = True,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs every cell that is not complete.

    Returns:
        Whether all are complete; without `wait` it may leave the last ones to other processes.

    Args:
        workers: processes at a time.
        population: cells of one shape that a process trains as one program, at most; None: as many as fit and pay.
        until: no more cells begin, but for the held-out one, once the half-width of the interval of the law's
            prediction of the held-out cell is at most this share of it.
        wait: for cells that other processes run, so that these are begun again here if they are killed; else it returns
            once other processes run every cell that is left.
        options: more `--runtime...` options of `slmjax train`, the same for every cell.

    Raises:
        UserError: an option would change the experiments; a file of a cell was changed; `workers` processes need more
            memory than is free; or cells failed.
        Diverged: all others are complete, but cells diverged.
        Preempted: SIGTERM, SIGUSR1 or Ctrl-C; the runs have saved their checkpoints.
        Superseded: a later start of this process's job has taken over its cells; nothing is written any more.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; expected at least 1")
    if population is not None and population < 1:
        raise UserError(f"--population is {population}; expected at least 1 (each cell alone)")
    check_options(options)
    folder.check()
    grouping.refuse_too_many(folder, folder.states(), workers, grouping.free_memory(folder))
    if until is not None and folder.held_out is None:
        raise UserError("--until-interval: the sweep has no held-out cell to predict; add Sweep(held_out=...)")
    if until is None and any(event["event"] == "skipped" for event in folder.events()):
        from slmjax.sweeps import narrowing

        narrowing.take_back(folder, folder.states())
    begun = time.time()
    with signals.noted() as received:
        running: list[_Running] = []
        try:
            watch = Watch(folder, until, say)
            _work(folder, workers, population, watch, options, wait, say, received, running, begun)
        finally:
            _end(folder, running, say, received)
    states = folder.states()
    _note(folder, states)
    folder.write_results()
    if received:
        raise Preempted(f"stopped with {_count(states)}; run the same command again to go on")
    left = {h for h, state in states.items() if state.name in ("running", "waiting")} if not wait else set()
    _verdict(folder, {h: state for h, state in states.items() if h not in left})
    return not left


def check_options(options: Sequence[str]) -> None:
    """
    Raises:
        UserError: one is no `--runtime...` option that all cells can share.
    """
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        if name in ("--runtime.workdir", "--runtime.data-dir"):
            raise UserError(f"{option}: every cell has its own folder, and the data folder that the plan names")
        if name.startswith("--") and not name.startswith("--runtime."):
            raise UserError(f"{option}: it would change the experiments; only --runtime... can be given here")


def _work(
    folder: Folder, workers: int, population: int | None, watch: Watch, options: Sequence[str], wait: bool,
    say: Callable[[str], None], received: list[int], running: list[_Running], begun: float,
) -> None:  # fmt: skip
    """Until nothing is left that this process could run or has to wait for."""
    looked, waited = 0.0, ""
    while not received:
        for claim in (claim for each in running for claim in each.leases):
            claim.check()
        ended = [each for each in running if each.process.poll() is not None]
        for each in ended:
            running.remove(each)
            _record(folder, each, say)
        if not ended and (len(running) >= workers or time.monotonic() - looked < LOOK):
            time.sleep(POLL)
            continue
        looked = time.monotonic()
        states = folder.states()
        _note(folder, states)
        if watch(states):
            states = folder.states()
        failed = _failed(folder, begun)
        here = {cell.hash for each in running for cell in each.cells}
        can = [cell for cell in ready(folder.cells, states) if cell.hash not in here | failed]
        alone = {cell.hash for cell in can if held(folder.run(cell) / ".lock")}
        can = [cell for cell in can if cell.hash not in alone]
        free, apart = grouping.free_memory(folder), grouping.apart(folder)
        while can and len(running) < workers:
            vacant = workers - len(running)
            cells = grouping.group(can[0], can, most=population, workers=vacant, free=free, apart=apart)
            can = [cell for cell in can if cell not in cells]
            if (started := _start(folder, cells, options, say, begun)) is not None:
                running.append(started)
        others = [h for h, state in states.items() if state.name == "running" and h not in here] + sorted(alone)
        if not running and not others and all(c.hash in failed for c in ready(folder.cells, folder.states())):
            return
        left = {h for h, state in states.items() if state.name not in ENDED}
        if not wait and not running and left <= {*others, *failed}:
            return
        text = f"waiting for {len(others)} cells that other processes run"
        if not running and others and text != waited:
            say(waited := text)


def _failed(folder: Folder, begun: float) -> set[str]:
    """Cells that failed or were stopped since then, here or in another process: they are not tried at once again."""
    return {e["cell"] for e in folder.events() if e["event"] in ("failed", "stopped") and e["time"] >= begun}


def _note(folder: Folder, states: dict[str, State]) -> None:
    """Writes `complete` for runs that went on and ended after the sweep process that had started them was killed."""
    noted = {e["cell"] for e in folder.events() if e["event"] == "complete"}
    for cell in folder.cells:
        if states[cell.hash].name == "complete" and cell.hash not in noted:
            with contextlib.suppress(_Taken), lease(folder.claim(cell), lambda owner: _Taken(owner)):
                if not any(e["event"] == "complete" and e["cell"] == cell.hash for e in folder.events()):
                    folder.append("complete", cell)


def _start(
    folder: Folder, cells: Sequence[Planned], options: Sequence[str], say: Callable[[str], None], begun: float
) -> _Running | None:
    """Claims cells and starts their process; without those that another process has, or that ended in the meantime."""
    claims = contextlib.ExitStack()
    taken = {cell.hash: _claimed(folder, cell, claims, begun) for cell in cells}
    mine = [cell for cell in cells if taken[cell.hash] is not None]
    if mine and mine[0].held_out:
        from slmjax.sweeps import predicting  # with scipy, which other cells need not wait for

        try:
            say(predicting.ahead(folder))
            written = sha256((folder.path / predicting.FILE).read_bytes()).hexdigest()
            folder.append("predicted", mine[0], sha256=written)
        except UserError as error:
            folder.append("failed", mine[0], reason=f"its loss cannot be predicted: {error}")
            mine = []
    if not mine:
        claims.close()
        return None
    for cell in mine:
        among = {"among": len(mine)} if len(mine) > 1 else {}
        folder.append("started", cell, label=cell.label, **among)
    log = claims.enter_context(folder.log(mine[0]).open("ab"))
    simple = len(mine) == 1 and not mine[0].trunk
    words = command(folder, mine[0], options) if simple else grouping.command(folder, mine, options)
    # A session of its own: Ctrl-C reaches this process alone, which then stops the others in order.
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    say(f"{mine[0].hash} started: {grouping.label(mine, duration)}")
    return _Running(mine, process, claims, [x for x in taken.values() if x is not None], time.monotonic())


def _claimed(folder: Folder, cell: Planned, claims: contextlib.ExitStack, begun: float) -> Lease | None:
    """The cell's lease, this process's until `claims` is closed; None if another process has it, or the cell ended."""
    with contextlib.ExitStack() as claim:
        try:
            mine = claim.enter_context(lease(folder.claim(cell), lambda owner: _Taken(owner)))
        except _Taken:
            return None
        if folder.states()[cell.hash].name in ENDED or cell.hash in _failed(folder, begun):
            return None
        claims.push(claim.pop_all())
        return mine


def command(folder: Folder, cell: Planned, options: Sequence[str]) -> list[str]:
    """The command line of a cell."""
    code = ["--code", folder.source] if cell.code else []
    experiment, *rest = train_words(folder, cell, options)
    return [sys.executable, "-m", "slmjax.cli.main", "train", experiment, *code, *rest]


def train_words(folder: Folder, cell: Planned, options: Sequence[str]) -> list[str]:
    """The arguments of `slmjax train` for a cell."""
    words = [str(folder.config(cell)), "--runtime.workdir", str(folder.run(cell))]
    words += ["--runtime.data-dir", folder.data_dir, "--runtime.tracking.group", folder.name]
    tags = [f"{name}={value}"[:64] for name, value in cell.tags.items()]
    words += ["--runtime.tracking.tags", *tags] if tags else []
    words += ["--runtime.checkpoints.keep-every", str(cell.keep)] if cell.keep else []
    return [*words, *options]


def _record(folder: Folder, each: _Running, say: Callable[[str], None], stopping: bool = False) -> None:
    """Writes down how a process ended, and frees its cells."""
    if len(each.cells) == 1:
        _record_one(folder, each, say, stopping)
        return
    stopped = stopping or each.process.returncode == Preempted.code
    try:
        for cell, claim in zip(each.cells, each.leases, strict=True):
            if not claim.mine():
                say(f"{cell.hash} is run by a later start of this job")
                continue
            state = folder.states()[cell.hash]
            run = state_of(read(folder.run(cell) / "ledger.jsonl"))
            if state.name == "complete":
                folder.append("complete", cell)
            elif run == "diverged":
                folder.append("diverged", cell, reason=state.reason)
            else:
                reason = "it goes on from its checkpoint" if stopped else _reason(
                    folder.log(each.cells[0]), each.process.returncode
                )  # fmt: skip
                folder.append("stopped" if stopped else "apart", cell, reason=reason)
                state = State(name="stopped" if stopped else "to be run alone", reason=reason)
            loss = f", loss {state.loss:.4f}" if state.name == "complete" else f": {state.reason}"
            say(f"{cell.hash} {state.name} after {duration(time.monotonic() - each.begun)}{loss}")
    finally:
        each.claim.close()
    folder.write_results()


def _record_one(folder: Folder, each: _Running, say: Callable[[str], None], stopping: bool) -> None:
    (cell,), code = each.cells, each.process.returncode
    try:
        if not each.leases[0].mine():
            say(f"{cell.hash} is run by a later start of this job")
            return
        if code == 0:
            folder.append("complete", cell)
            state = folder.states()[cell.hash]
        elif code == 3:
            folder.append("diverged", cell, reason=_reason(folder.log(cell), code))
            state = folder.states()[cell.hash]
        elif held(folder.run(cell) / ".lock"):  # a process of an earlier sweep process runs it: no failure
            say(f"{cell.hash} is run by another process")
            return
        else:
            stopped = stopping or code == Preempted.code
            reason = "stopped; it goes on from its checkpoint" if stopped else _reason(folder.log(cell), code)
            folder.append("stopped" if stopped else "failed", cell, reason=reason)
            state = State(name="stopped" if stopped else "failed", reason=reason)
    finally:
        each.claim.close()
    folder.write_results()
    loss = f", loss {state.loss:.4f}" if state.name == "complete" else f": {state.reason}"
    say(f"{cell.hash} {state.name} after {duration(time.monotonic() - each.begun)}{loss}")


def _reason(log: Path, code: int) -> str:
    """In one line, why a process failed: its message if it left one."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    start = "slmjax: error: "
    said = next((line.removeprefix(start) for line in reversed(lines) if line.startswith(start)), "")
    return (said or (lines[-1] if lines else "it printed nothing"))[:500] + f" (exit code {code})"


def _end(folder: Folder, running: list[_Running], say: Callable[[str], None], received: list[int]) -> None:
    """Stops the processes that still run, and waits until each has saved; a second Ctrl-C ends them at once. Other
    signals do not: schedulers send them more than once."""
    if not running:
        return
    count = sum(len(each.cells) for each in running)
    say(f"stopping {count} runs, which save a checkpoint first; a second Ctrl-C ends them at once")
    for each in running:
        each.process.terminate()
    last, pressed = time.monotonic() + GRACE, max(1, received.count(signal.SIGINT))
    while any(each.process.poll() is None for each in running):
        if time.monotonic() > last or received.count(signal.SIGINT) > pressed:
            for each in running:
                each.process.kill()
        time.sleep(POLL)
    for each in running:
        _record(folder, each, say, stopping=True)


def _verdict(folder: Folder, states: dict[str, State]) -> None:
    """Raises unless every cell is complete, or was dropped by successive halving."""
    bad = [state for state in states.values() if state.name not in ("complete", "dropped")]
    if not bad:
        return
    why = f"{_count(states)}; slmjax sweep status {folder.path} says why"
    if all(state.name == "diverged" for state in bad):
        raise Diverged(why)
    raise UserError(f"not every cell is complete: {why}")


def _count(states: dict[str, State]) -> str:
    """`3 of 5 cells complete, 2 failed`."""
    names = [state.name for state in states.values()]
    rest = [f"{names.count(name)} {name}" for name in dict.fromkeys(names) if name != "complete"]
    return ", ".join([f"{names.count('complete')} of {len(names)} cells complete", *rest])
