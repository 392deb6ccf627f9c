"""metrics.jsonl: bit-exact floats, torn tails, trimming on resume, a full disk."""

import json
import math
import os
import signal
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmjax.errors import StorageError
from slmjax.track import jsonl
from slmjax.track.jsonl import JsonLines, Metrics, decode, encode, read

pytestmark = pytest.mark.fast


def bits(x):
    return struct.pack("d", x)


@given(st.floats(allow_nan=False), st.integers(0, 2**48))
def test_numbers_come_back_bit_for_bit(x, n):
    row = decode(encode({"x": x, "n": n}))
    assert bits(row["x"]) == bits(x)
    assert row["n"] == n
    assert isinstance(row["n"], int)


def test_what_json_lacks_is_a_string_in_the_file_and_a_float_again_when_read():
    line = encode({"a": math.nan, "b": math.inf, "c": -math.inf, "d": "text"})
    assert json.loads(line, parse_constant=pytest.fail) == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "text"}
    row = decode(line)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, "text")


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\0", b'\0\0\n{"st\n', b"[1]\n"])
def test_a_torn_tail_is_dropped_and_then_overwritten(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + encode({"step": 2}) + torn)
    assert [row["step"] for row in read(path)] == [1, 2]
    lines = JsonLines(path)
    lines.append({"step": 3})
    assert path.read_bytes() == b"".join(encode({"step": n}) for n in (1, 2, 3))


def test_damage_before_the_end_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + b'{"st\x00p": \n' + encode({"step": 3}))
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 2 is damaged; remove that line"):
        read(path)


def test_resume_drops_later_rows_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 6):
        metrics.log(step, {"loss": 1 / step})
    before = path.read_bytes().splitlines()
    metrics.resume(3)
    assert path.read_bytes().splitlines() == before[:3]
    metrics.log(4, {"loss": 0.0})
    assert [(r["step"], r["loss"]) for r in read(path)][2:] == [(3, 1 / 3), (4, 0.0)]
    assert not list(tmp_path.glob("*.new"))


def test_resume_with_nothing_to_drop_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.log(1, {"loss": 1.0})
    inode = path.stat().st_ino
    metrics.resume(1)
    metrics.log(2, {"loss": 1.0})
    assert path.stat().st_ino == inode
    assert len(read(path)) == 2


def test_a_kill_while_trimming_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 4):
        metrics.log(step, {})
    before = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        metrics.resume(1)
    monkeypatch.undo()
    assert path.read_bytes() == before
    Metrics(path).resume(1)
    assert [row["step"] for row in read(path)] == [1]


def test_elapsed_goes_on_over_attempts_by_a_clock_that_cannot_jump(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(jsonl.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jsonl.time, "time", lambda: 1e9 - now[0])  # a wall clock that runs backwards
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in (1, 2, 3):
        now[0] += 10
        first.log(step, {})
    now[0] = 5.0  # another boot
    second = Metrics(path)
    now[0] = 8.0
    second.resume(2)
    now[0] = 12.0
    second.log(3, {})
    assert [row["elapsed"] for row in read(path)] == [10.0, 20.0, 24.0]


def test_a_full_disk_is_said_and_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.log(1, {"loss": 1.0})
    whole = path.read_bytes()
    write = os.write
    monkeypatch.setattr(jsonl.os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
        metrics.log(2, {"loss": 1.0})
    monkeypatch.undo()
    assert path.read_bytes() == whole
    metrics.log(2, {"loss": 2.0})
    assert [row["loss"] for row in read(path)] == [1.0, 2.0]


def test_sigkill_loses_no_row_that_was_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import sys, itertools\n"
        "from slmjax.track.jsonl import Metrics\n"
        "metrics = Metrics(sys.argv[1])\n"
        "for step in itertools.count(1):\n"
        "    metrics.log(step, {'loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as child:
        while int(child.stdout.readline()) < 500:
            pass
        os.kill(child.pid, signal.SIGKILL)
        *said, _ = ["500", *child.stdout.read().split("\n")]
    rows = read(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= int(said[-1])
