"""All trackers together, over two attempts of a run."""

import json

import pytest

from slmjax.errors import StorageError
from slmjax.track.jsonl import read
from slmjax.track.ledger import state_of
from slmjax.track.progress import Progress
from slmjax.track.trackers import Trackers, open_trackers

pytestmark = pytest.mark.fast

CONFIG = {"fingerprint": "ab" * 32, "experiment": {"name": "tiny", "steps": 6}}


def opened(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return open_trackers(folder, config=CONFIG, environment={"python": "3"}, steps=6, wandb="disabled", pue=1.2)[0]


def test_two_attempts_of_a_run(tmp_path):
    first = opened(tmp_path)
    first.resume(0)
    for step in range(1, 5):
        first.log(step, {"loss": 1 / step, "skipped": 0.0})
    state = json.loads(json.dumps(first.state()))
    first.finish("preempted")
    assert state_of(read(tmp_path / "ledger.jsonl")) == "preempted"

    second = opened(tmp_path)
    second.restore(state)
    second.resume(3)
    for step in range(4, 7):
        second.log(step, {"loss": 1 / step, "skipped": 0.0})
    second.artifact(tmp_path / "checkpoints" / "6", "checkpoint", {"step": 6})
    second.finish("complete")

    assert [(row["step"], row["loss"]) for row in read(tmp_path / "metrics.jsonl")] == [(s, 1 / s) for s in range(1, 7)]
    events = [e["event"] for e in read(tmp_path / "ledger.jsonl")]
    assert events == ["created", "started", "preempted", "started", "resumed", "saved", "complete"]
    energy = json.loads((tmp_path / "energy.json").read_text())
    assert (energy["pue"], energy["parts"]["cpu"]["kwh"] > 0) == (1.2, True)
    assert "complete" in (tmp_path / "report.html").read_text()
    assert "step 6/6" in (tmp_path / "log.txt").read_text()


class Told(Progress):
    """A tracker that only takes note of the end."""

    def __init__(self, error=None):
        self.error, self.status = error, None

    def finish(self, status):
        self.status = status
        if self.error:
            raise self.error


def test_every_tracker_is_told_of_the_end_even_where_one_fails():
    first, last = Told(StorageError("disk full")), Told()
    with pytest.raises(StorageError, match="disk full"):
        Trackers(a=first, b=last).finish("failed")
    assert last.status == "failed"
