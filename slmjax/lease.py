"""A folder that one process at a time writes in, also where several machines share the disk it is on.

The file lock of `lock` keeps out the other processes of a machine, and the kernel frees it when its holder dies. Not
every shared file system carries file locks from machine to machine, and none ends a process that a scheduler has lost
sight of and started again elsewhere. So whoever takes a file lock here also takes a lease: a file NAME.lease/N beside
it, whose number N, the attempt, is one more than that of the holder before. The holder touches its lease every few
seconds, and renames it to N.free when it gives it back. Who takes the next attempt removes the lease before it, and who
finds its lease gone writes no more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slmjax.errors import UserError
from slmjax.lock import held as locked
from slmjax.lock import hold

BEAT = 5.0
"""Seconds between two touches of a lease by its holder"""
VALID = 10.0
"""Seconds after the last touch that succeeded in which its holder may write without looking whether it still has it"""
SETTLE = 15.0
"""Seconds from taking a lease from a holder that may be alive on another machine until the new holder may write: more
than VALID + BEAT / 2, so that the old one has noticed"""
SILENCE = 60.0
"""Seconds without a touch after which the holder on another machine counts as dead"""
LOOK = 0.1
"""Seconds in which a process that only looks whether a file lock is held has surely let go of it"""
LEAVE = 180.0
"""Seconds that the earlier attempt of the same job has to end, once its lease was taken"""

# Goes on while the machine sleeps, as `time.monotonic` does not on Linux.
_clock = (lambda: time.clock_gettime(time.CLOCK_BOOTTIME)) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


class Superseded(UserError):
    """A later attempt has taken what this process held: it must write no more."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that takes leases."""

    pid: int
    host: str
    machine: str
    """The same for two processes where a file lock of one always stops the other: under one running kernel"""
    job: str = ""
    """The scheduler's job that it belongs to; empty without a scheduler"""
    restart: int = 0
    """How often the scheduler has started that job again"""

    def follows(self, other: Holder) -> bool:
        """Whether it belongs to a later start of the same job, which the scheduler makes only once it has given up the
        earlier one."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


def this_process(environ: Mapping[str, str] = os.environ) -> Holder:
    """Under SLURM with its job and how often that was requeued."""
    host, job, restart = socket.gethostname(), environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "")
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        machine = host
    name = f"{job}@{environ.get('SLURM_CLUSTER_NAME', '')}" if job else ""
    return Holder(
        pid=os.getpid(), host=host, machine=machine, job=name, restart=int(restart) if restart.isdigit() else 0
    )


class Lease:
    """One attempt's right to write; made by `lease`."""

    def __init__(self, file: Path, attempt: int, taken_over: Callable[[], None] | None = None):
        """`taken_over`: called in a thread if the lease is lost and not given back within `VALID` seconds."""
        self.attempt = attempt
        self._base, self._file = file, _path(file, attempt)
        self._lost = False
        self._touched = _clock()
        self._over = threading.Event()
        self._taken_over = taken_over
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self, *, now: bool = False) -> None:
        """Call it before each write: it costs a comparison, or where the process stood still for a while, a look at the
        file. `now` always looks: for a write that nothing can undo.

        Raises:
            Superseded: a later attempt has the lease.
        """
        if not self._lost and (now or _clock() - self._touched > VALID):
            self._touch()
        if self._lost:
            newest = _newest(self._base)
            by = f"attempt {newest.attempt}, {newest.holder or 'another process'}," if newest else "another process"
            raise Superseded(
                f"{self._base.parent}: {by} has taken over from this process, attempt {self.attempt}, which stops and "
                "writes no more"
            )

    def mine(self) -> bool:
        """Whether the lease is still this process's; looks at the file."""
        try:
            self.check(now=True)
        except Superseded:
            return False
        return True

    def _touch(self) -> None:
        now = _clock()
        try:
            os.utime(self._file)
            self._touched = now
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # else the disk does not answer: `check` looks again
                return
            self._lost = True

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and not self._lost:
            self._touch()
        if self._lost and not self._over.wait(VALID) and self._taken_over:
            self._taken_over()

    def _give_back(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):  # lost, or its folder is gone
            self._file.rename(f"{self._file}.free")  # a rename works on a full disk too


@contextlib.contextmanager
def lease(
    file: Path,
    refused: Callable[[str], UserError],
    wait: float = 0,
    taken_over: Callable[[], None] | None = None,
    holder: Holder | None = None,
) -> Iterator[Lease]:
    """Holds a lock file and its lease.

    The lease is refused while another process holds the file lock, or is alive on another machine with the lease. But a
    later start of the same job takes it at once, and waits until the earlier one has ended.

    Args:
        refused: who holds it (process and host) -> what to raise.
        wait: seconds until it is refused.
        taken_over: see `Lease`.
        holder: who takes it; this process by default.
    """
    me = holder or this_process()
    file.parent.mkdir(parents=True, exist_ok=True)
    last = time.monotonic() + wait
    before = _newest(file)
    attempt = None
    if before is not None and before.held and before.holder is not None and me.follows(before.holder):
        attempt = _take(file, me, before.attempt)  # before the file lock, which the earlier process frees only now
        wait = max(wait, LEAVE)
    settled = time.monotonic() + SETTLE

    def by(owner: str) -> UserError:
        newest = _newest(file)
        return refused(str(newest.holder) if newest and newest.held and newest.holder else owner)

    with hold(file, by, wait):
        while attempt is None:
            before = _newest(file)
            if before is None or not before.held or _gone(file, before, me):
                attempt = _take(file, me, before.attempt if before else 0)
                settled = 0.0
            elif time.monotonic() >= last:
                raise refused(str(before.holder or "another process"))
            else:
                time.sleep(0.2)
        if before is not None and before.holder is not None and before.holder.machine != me.machine:
            time.sleep(max(0.0, settled - time.monotonic()))
        mine = Lease(file, attempt, taken_over)
        try:
            mine.check(now=True)  # it was not touched while this waited, and may have been taken for dead
            yield mine
        finally:
            mine._give_back()


def held(file: Path) -> bool:
    """Whether a process, which may be this one, holds the lease. False if this process may take it over, as a later
    start of the same job."""
    newest, me = _newest(file), this_process()
    if newest is None or not newest.held:
        return False
    holder = newest.holder
    if holder is not None and me.follows(holder):
        return False
    if holder is not None and holder.machine == me.machine:
        return (holder.pid, holder.host) == (me.pid, me.host) or locked(file, LOOK)
    with contextlib.suppress(FileNotFoundError):  # it was given back
        return time.time() - newest.path.stat().st_mtime < SILENCE
    return False


@dataclass(frozen=True)
class _Found:
    attempt: int
    path: Path
    held: bool
    holder: Holder | None
    """None where the file cannot be read"""


def _path(file: Path, attempt: int) -> Path:
    return _folder(file) / str(attempt)


def _folder(file: Path) -> Path:
    return file.with_name(f"{file.name}.lease")


def _all(file: Path) -> list[tuple[int, bool, Path]]:
    """(attempt, whether it was not given back, path) of the leases of a lock file."""
    with contextlib.suppress(FileNotFoundError):
        parts = [(path.stem, path.suffix, path) for path in _folder(file).iterdir()]
        return [(int(n), not end, path) for n, end, path in parts if n.isdigit() and end in ("", ".free")]
    return []


def _newest(file: Path) -> _Found | None:
    attempt, is_held, path = max(_all(file), default=(0, False, file))
    if not attempt:
        return None
    try:
        holder = Holder(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        holder = None
    return _Found(attempt, path, is_held, holder)


def _gone(file: Path, found: _Found, me: Holder) -> bool:
    """Whether the holder is dead: on this machine, since its file lock is free; on another one, since it is silent. The
    ages of two files are compared, so that the clocks of the machines need not agree."""
    if found.holder is not None and found.holder.machine == me.machine:
        return True
    probe = _folder(file) / f"probe-{me.pid}-{me.host}"
    try:
        probe.write_text("")
        return probe.stat().st_mtime - found.path.stat().st_mtime > SILENCE
    except FileNotFoundError:  # it was given back
        return False
    finally:
        probe.unlink(missing_ok=True)


def _take(file: Path, me: Holder, after: int) -> int | None:
    """Makes the lease of the next attempt, whole, and removes those before it; None if another process was faster."""
    mine = _path(file, after + 1)
    part = mine.with_name(f"part-{me.pid}-{me.host}")
    mine.parent.mkdir(exist_ok=True)
    try:
        part.write_text(json.dumps(asdict(me)))
        try:
            os.link(part, mine)
        except FileExistsError:
            return None
        except OSError:  # no hard links here
            try:
                with mine.open("x") as empty:
                    empty.write(part.read_text())
            except FileExistsError:
                return None
    finally:
        part.unlink(missing_ok=True)
    for attempt, _, path in _all(file):
        if attempt <= after:
            path.unlink(missing_ok=True)
    return after + 1
