"""Leases: attempts are counted, the dead are followed at once, and a later start of a job ends the earlier one."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from slmjax import lease as leases
from slmjax.errors import UserError
from slmjax.lease import Holder, Superseded, held, lease, this_process

pytestmark = pytest.mark.fast


def refused(owner):
    return UserError(f"{owner} is at work")


def names(file):
    return sorted(path.name for path in (file.parent / f"{file.name}.lease").iterdir())


def there(**fields):
    """A process on another machine."""
    return Holder(**{"pid": 7, "host": "n2", "machine": "another", **fields})


@pytest.fixture
def without_file_locks(monkeypatch):
    """As on a shared disk that does not carry file locks from machine to machine."""
    monkeypatch.setattr(leases, "hold", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(leases, "locked", lambda *_: False)


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.02, "VALID": 0.05, "SETTLE": 0.3}.items():
        monkeypatch.setattr(leases, name, seconds)


def test_each_holder_has_the_next_attempt(tmp_path):
    file = tmp_path / "lock"
    assert not held(file)
    for attempt in (1, 2, 3):
        with lease(file, refused) as mine:
            assert mine.attempt == attempt
            assert held(file)
            assert names(file) == [str(attempt)]
            mine.check(now=True)
        assert not held(file)
        assert names(file) == [f"{attempt}.free"]


OTHER = """
import pathlib, sys, time
from slmjax.errors import UserError
from slmjax.lease import lease
with lease(pathlib.Path(sys.argv[1]), UserError) as mine:
    print(mine.attempt, flush=True)
    while True:
        mine.check(now=True)
        time.sleep(0.02)
"""


@contextlib.contextmanager
def other(file, **environ):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(file)], env={**os.environ, **environ}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout.readline() == "1\n"
            yield process
        finally:
            process.kill()


def test_a_process_of_this_machine_is_followed_as_soon_as_it_is_dead(tmp_path):
    file = tmp_path / "lock"
    with other(file) as process:
        assert held(file)
        with pytest.raises(UserError, match=f"process {process.pid} on .* is at work"), lease(file, refused):
            pass
        process.kill()
        process.wait()
    assert not held(file)
    with lease(file, refused) as mine:
        assert mine.attempt == 2


def test_a_later_start_of_the_same_job_takes_over(tmp_path, monkeypatch):
    file = tmp_path / "lock"
    with other(file, SLURM_JOB_ID="12") as process:
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        assert held(file)  # the same start: another process of the job
        with pytest.raises(UserError, match=r"process .* \(job 12@\) is at work"), lease(file, refused):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert not held(file)
        with lease(file, refused) as mine:
            assert mine.attempt == 2
            assert process.wait() == 1
        said = process.stderr.read()
    assert f"attempt 2, process {os.getpid()} on" in said
    assert "has taken over from this process, attempt 1, which stops and writes no more" in said


def test_who_is_alive_on_another_machine_is_left_alone(tmp_path, without_file_locks, quick):
    file = tmp_path / "lock"
    with lease(file, refused, holder=there()):
        assert held(file)
        with pytest.raises(UserError, match="process 7 on n2 is at work"), lease(file, refused, wait=0.3):
            pass
    with lease(file, refused) as mine:
        assert mine.attempt == 2


def test_who_is_silent_on_another_machine_is_followed_and_notices_before_it_writes(tmp_path, without_file_locks):
    file = tmp_path / "lock"
    with lease(file, refused, holder=there()) as old:
        before = time.time() - leases.SILENCE - 5
        os.utime(tmp_path / "lock.lease" / "1", (before, before))
        assert not held(file)
        with lease(file, refused) as mine:
            assert mine.attempt == 2
            old.check()  # it has touched its lease a moment ago, so it need not look
            old._touched -= leases.VALID + 1  # it stood still
            with pytest.raises(Superseded, match=r"attempt 2, process .* has taken over"):
                old.check()
            assert not old.mine()
        assert names(file) == ["2.free"]  # giving back what is lost changes nothing
    assert names(file) == ["2.free"]


def test_a_later_start_on_another_machine_waits_until_the_earlier_one_has_noticed(tmp_path, without_file_locks, quick):
    file = tmp_path / "lock"
    lost = threading.Event()
    with lease(file, refused, taken_over=lost.set, holder=there(job="1@c")) as old:
        begun = time.monotonic()
        with lease(file, refused, holder=replace(this_process(), job="1@c", restart=1)) as mine:
            assert time.monotonic() - begun >= leases.SETTLE
            assert mine.attempt == 2
            assert lost.is_set()  # its thread noticed, and nobody gave the lease back
            with pytest.raises(Superseded):
                old.check()


def test_one_of_many_takes_an_attempt(tmp_path, without_file_locks, quick):
    file = tmp_path / "lock"
    at_once = threading.Barrier(8)
    inside, most, attempts = [], [], []

    def work(number):
        at_once.wait()
        with lease(file, refused, wait=60, holder=there(pid=number, machine=str(number))) as mine:
            inside.append(number)
            most.append(len(inside))
            attempts.append(mine.attempt)
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    assert attempts == list(range(1, 9))


def test_a_lease_that_cannot_be_read_is_left_alone_until_it_is_silent(tmp_path):
    file = tmp_path / "lock"
    at = tmp_path / "lock.lease" / "4"
    at.parent.mkdir()
    at.write_text("{")
    with pytest.raises(UserError, match="another process is at work"), lease(file, refused):
        pass
    os.utime(at, (1, 1))
    with lease(file, refused) as mine:
        assert mine.attempt == 5
