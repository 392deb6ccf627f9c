"""The ledger: events, the states derived from them, attempts, torn tails."""

import os

import pytest

from slmjax.errors import Diverged
from slmjax.track.jsonl import read
from slmjax.track.ledger import EVENTS, Ledger, attempts, state_of

pytestmark = pytest.mark.fast


def made(*events):
    return [{"event": e} for e in events]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "queued"),
        (["created"], "queued"),
        (["created", "started"], "running"),
        (["created", "started", "saved", "evaluated", "spike", "rolled back"], "running"),
        (["created", "started", "preempted"], "preempted"),
        (["created", "started", "preempted", "started", "resumed"], "running"),
        (["created", "started", "diverged"], "diverged"),
        (["created", "started", "started", "failed"], "failed"),
        (["created", "started", "complete", "exported"], "complete"),
    ],
)
def test_states(events, state):
    assert state_of(made(*events)) == state


def test_events_are_numbered_by_attempt(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    assert first.append("created", name="x")["attempt"] == 0
    assert first.append("started")["pid"] == os.getpid()
    first.append("saved", step=10)
    second = Ledger(path)
    second.append("started")
    second.append("resumed", step=10)
    events = second.events()
    assert [e["attempt"] for e in events] == [0, 1, 1, 2, 2]
    assert attempts(events) == 2
    assert second.status == "running"
    assert (events[0]["name"], events[-1]["step"]) == ("x", 10)


def test_an_unknown_event_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown event 'finished'"):
        Ledger(tmp_path / "ledger.jsonl").append("finished")
    assert set(EVENTS.values()) - {None} == {"queued", "running", "preempted", "failed", "diverged", "complete"}


def test_a_torn_tail_is_no_event(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append("created")
    with path.open("ab") as file:
        file.write(b'{"event": "comp')
    ledger = Ledger(path)
    assert ledger.status == "queued"
    ledger.append("started")
    assert [e["event"] for e in read(path)] == ["created", "started"]


def test_each_event_is_on_disk_before_the_call_returns(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    ledger.append("created")
    assert synced == [(tmp_path / "ledger.jsonl").stat().st_size]


def test_as_a_tracker_it_writes_down_what_the_loop_tells(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("started")
    ledger.resume(0)
    ledger.log(1, {"loss": 3.0, "skipped": 0.0})
    ledger.log(2, {"loss": 9.0, "grad_norm": 50.0, "skipped": 1.0})
    ledger.log(3, {"loss": 3.0, "skipped": 1.0, "validation/loss": 2.5})
    ledger.resume(1)
    ledger.artifact(tmp_path / "checkpoints" / "3", "checkpoint", {"step": 3})
    ledger.artifact(tmp_path / "hf", "export", {})
    ledger.finish("complete")
    events = [(e["event"], e.get("step")) for e in read(tmp_path / "ledger.jsonl")]
    assert events == [
        ("started", None), ("spike", 2), ("evaluated", 3), ("rolled back", 1), ("saved", 3), ("exported", None),
        ("complete", None),
    ]  # fmt: skip


def test_a_resumed_run_counts_its_earlier_skips_as_old(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("started")
    ledger.resume(10)
    ledger.log(11, {"loss": 3.0, "skipped": 4.0})
    assert [e["event"] for e in ledger.events()] == ["started", "resumed"]


def test_the_reason_of_a_failure_is_kept_without_secrets(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    key = "hf_" + "x" * 30

    def train():
        try:
            raise Diverged(f"loss is nan with {key}\nat step 3")
        finally:
            ledger.finish("diverged")

    with pytest.raises(Diverged):
        train()
    last = read(tmp_path / "ledger.jsonl")[-1]
    assert last["event"] == "diverged"
    assert last["reason"] == "Diverged: loss is nan with [redacted] at step 3"
