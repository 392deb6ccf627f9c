"""What a person sees: plain lines, the bar on a terminal, the log; how rarely it draws."""

import io
import re

import pytest

from slmjax.track import progress
from slmjax.track.progress import Progress, describe, duration, si

pytestmark = pytest.mark.fast

ROW = {"loss": 3.14159, "tokens_per_second": 12345.6, "mfu": 0.345, "memory_bytes": 3 * 2**30}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_at_intervals_with_all_that_matters(tmp_path, clock):
    out = io.StringIO()
    shown = Progress(1000, tmp_path / "log.txt", stream=out, line=10.0)
    for step in range(1, 101):
        clock[0] += 1.0
        shown.log(step, ROW)
    shown.finish("preempted")
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[1] == "step 11/1000  loss 3.1416  12.3 ktok/s  MFU 34.5%  3.00 GiB  16 min 29 s left"
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert len(logged) == 11
    assert logged[1].endswith(lines[1])
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", logged[1])
    assert logged[-1].endswith("  preempted")


def test_evaluations_and_the_last_step_are_always_said(clock):
    out = io.StringIO()
    shown = Progress(3, stream=out)
    shown.log(1, ROW)
    shown.log(2, {**ROW, "validation/loss": 2.5})
    shown.log(3, ROW)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "validation 2.5000" in out.getvalue()


def test_a_validation_loss_is_said_once_and_on_the_bar_with_its_step(clock):
    lines, bar = io.StringIO(), Terminal()
    for stream in (lines, bar):
        shown = Progress(9, stream=stream, line=0.0)
        shown.log(1, ROW)
        shown.log(2, {**ROW, "validation/loss": 2.5})
        clock[0] += 1.0
        shown.log(3, ROW)
        shown.finish("preempted")
    assert ["validation" in line for line in lines.getvalue().splitlines()] == [False, True, False]
    assert "validation 2.5000 (step 2)" in bar.getvalue()


def test_the_time_left_counts_from_the_first_step_so_compilation_does_not(clock):
    out = io.StringIO()
    shown = Progress(100, stream=out, line=0.0)
    clock[0] = 500.0
    shown.log(1, ROW)
    clock[0] = 510.0
    shown.log(11, ROW)
    assert out.getvalue().splitlines()[-1].endswith("1 min 29 s left")
    shown.resume(50)
    clock[0] = 600.0
    shown.log(51, ROW)
    clock[0] = 602.0
    shown.log(52, ROW)
    assert out.getvalue().splitlines()[-1].endswith("1 min 36 s left")


def test_a_terminal_gets_a_bar_that_is_redrawn_a_few_times_a_second(tmp_path, clock, monkeypatch):
    drawn = []
    out = Terminal()
    shown = Progress(10_000, tmp_path / "log.txt", stream=out)
    update = shown._live.update
    monkeypatch.setattr(shown._live, "update", lambda *a, **k: (drawn.append(k), update(*a, **k)))
    for step in range(1, 1001):
        clock[0] += 0.01
        shown.log(step, ROW)
    shown.say("[bold] is not markup")
    shown.finish("complete")
    assert 30 < len(drawn) <= 42
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "[bold] is not markup" in text
    assert "1000/10000" in text
    assert "[bold] is not markup" in (tmp_path / "log.txt").read_text()


def test_a_line_after_the_end_still_shows(tmp_path):
    out = io.StringIO()
    shown = Progress(1, tmp_path / "log.txt", stream=out)
    shown.finish("complete")
    shown.say("uploaded")
    assert out.getvalue() == "uploaded\n"


def test_memory_is_this_processs_where_no_device_tells(clock):
    assert re.search(r"loss 1.0000  \d+\.\d\d GiB", describe({"loss": 1.0}))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3725, "1 h 02 min"), (90061, "1 d 1 h"), (1e400, "?")],
)
def test_duration(seconds, text):
    assert duration(float(seconds)) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999 "), (1234, "1.23 k"), (5.12e6, "5.12 M"), (2e12, "2 T")])
def test_si(value, text):
    assert si(value) == text
