"""The loop: resuming, signals, hooks, rows. Everything that a row holds but the clock's is repeated bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy

from slmjax.errors import Preempted
from slmjax.lease import Superseded
from slmjax.train import consensus, loop
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import extra, steps
from slmjax.train.guard import Rollback, Skip
from slmjax.train.hooks import Evaluate, Profile, Sample, loss_estimate
from slmjax.train.lock import Locked, Open, lock
from slmjax.train.rows import batch_hash
from slmjax.train.signals import Interrupted, Signals


def train(workdir, *, data=None, last=12, every=5, guard=Skip(), say=print, **more):  # noqa: B008
    tracker = toy.Tracker()
    state = loop.train(loop.Job(
        program=toy.program(guard=guard), data=data or toy.Data(), steps=last, workdir=workdir, tracker=tracker,
        guard=guard, checkpoints=Checkpoints(**{"every": every} | more.pop("policy", {})), say=say, **more,
    ))  # fmt: skip
    return state, tracker


def kept(rows):
    """What must not depend on when or where a run was interrupted. NaN equals NaN."""
    return {s: {k: repr(x) for k, x in row.items() if k not in loop.CLOCK} for s, row in rows.items()}


def at_batch(index, action):
    def on_next(i):
        if i == index:
            action()

    return on_next


def stop(number):
    return lambda: os.kill(os.getpid(), number)


class Killed(BaseException):
    pass


def die():
    raise Killed


@pytest.mark.parametrize("guard", [Skip(), Rollback(window=4)])
def test_an_interrupted_run_repeats_the_one_that_was_not(tmp_path, guard):
    """Ended without warning at three places, then told to stop, with a NaN on the way: all rows and the final state
    are those of a run that was left alone."""
    whole, expected = train(tmp_path / "whole", data=toy.Data(nan=(7,)), last=20, guard=guard)
    rows = {}
    for moment, action, error in [
        (0, die, Killed),
        (3, die, Killed),
        (8, die, Killed),
        (13, stop(signal.SIGTERM), Preempted),
        (99, die, None),
    ]:
        data = toy.Data(nan=(7,), on_next=at_batch(moment, action))
        tracker = toy.Tracker()
        tracker.rows = rows
        arguments = {
            "data": data, "steps": 20, "workdir": tmp_path / "cut", "tracker": tracker, "guard": guard,
            "checkpoints": Checkpoints(every=5),
        }  # fmt: skip
        if error:
            with pytest.raises(error):
                loop.train(loop.Job(program=toy.program(guard=guard), **arguments))
        else:
            state = loop.train(loop.Job(program=toy.program(guard=guard), **arguments))
        rows = tracker.rows
    assert list(rows) == list(range(1, 21))
    assert kept(rows) == kept(expected.rows)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(signal.SIGTERM, Preempted, 75), (signal.SIGUSR1, Preempted, 75), (signal.SIGINT, Interrupted, 130)],
)
def test_told_to_stop_it_saves_and_says_how_to_go_on(tmp_path, number, error, code):
    before = signal.getsignal(number)
    with pytest.raises(error, match=f"stopped by {number.name} after step (5|6), which is saved: run the same") as e:
        train(tmp_path, data=toy.Data(on_next=at_batch(4, stop(number))), every=100, last=30)
    assert e.value.code == code
    assert signal.getsignal(number) is before
    (step,) = steps(tmp_path / "checkpoints")
    assert extra(tmp_path / "checkpoints")["data"]["next"] == step
    said = []
    _, tracker = train(tmp_path, last=8, say=said.append)
    assert said == [f"resumed after step {step} of 8"]
    assert list(tracker.rows) == list(range(step + 1, 9))


def test_the_status_of_each_ending(tmp_path):
    tracker = toy.Tracker()
    arguments = {"steps": 3, "tracker": tracker, "guard": Skip(), "checkpoints": Checkpoints()}
    with pytest.raises(Killed):
        loop.train(
            loop.Job(program=toy.program(), data=toy.Data(on_next=at_batch(1, die)), workdir=tmp_path, **arguments)
        )
    assert tracker.status == "failed"
    assert train(tmp_path / "a", last=2)[1].status == "complete"


def test_a_folder_in_use_is_left_alone(tmp_path):
    tracker = toy.Tracker()
    arguments = {"steps": 3, "tracker": tracker, "guard": Skip(), "checkpoints": Checkpoints(), "workdir": tmp_path}
    with lock(tmp_path / "checkpoints"), pytest.raises(Locked, match="is at work here"):
        loop.train(loop.Job(program=toy.program(), data=toy.Data(), **arguments))
    assert tracker.status is None
    assert tracker.resumed == []


class Taken(Open):
    """The lease is taken by a later attempt as soon as `closing` is set, or once a save has begun after that."""

    def __init__(self, in_a_save):
        self.in_a_save, self.closing, self.closed = in_a_save, False, False

    def check(self, *, now=False):
        if self.closed:
            raise Superseded("taken")
        self.closed = self.closing and (now or not self.in_a_save)
        if self.closed and not self.in_a_save:
            raise Superseded("taken")

    def mine(self):
        return not self.closed


@pytest.mark.parametrize("in_a_save", [False, True])
def test_who_is_taken_over_from_writes_no_more(tmp_path, in_a_save):
    tracker, fence = toy.Tracker(), Taken(in_a_save)

    def take(index):
        fence.closing |= index == 5

    with pytest.raises(Superseded):
        loop.train(loop.Job(
            program=toy.program(), data=toy.Data(on_next=take), steps=9, workdir=tmp_path, tracker=tracker,
            guard=Skip(), checkpoints=Checkpoints(every=2), fence=fence,
        ))  # fmt: skip
    assert 6 not in steps(tmp_path / "checkpoints")  # nor is a save committed that is being written
    assert max(tracker.rows) == (6 if in_a_save else 4)
    assert tracker.status is None
    assert tracker.artifacts == []


def test_a_second_ctrl_c_ends_at_once():
    code = (
        "import os, signal, time\nfrom slmjax.train.signals import Signals\n"
        "with Signals() as s:\n    os.kill(os.getpid(), signal.SIGINT)\n    print(s.received.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "SIGINT\n"


def test_signals_are_left_alone_outside_the_main_thread():
    import threading

    before, entered = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]


def test_a_finished_run_stays_finished(tmp_path):
    state, _ = train(tmp_path, last=4)
    again, tracker = train(tmp_path, last=4)
    assert tracker.rows == {}
    assert tracker.status == "complete"
    assert int(again.step) == int(state.step) == 4


def test_saves_by_the_clock(tmp_path):
    data = toy.Data(on_next=lambda i: time.sleep(0.3) if i == 4 else None)
    train(tmp_path, data=data, every=0, last=9, policy={"seconds": 0.25, "keep_last": 9})
    found = steps(tmp_path / "checkpoints")
    assert found[-1] == 9
    assert set(found) & {5, 6}


def test_the_best_is_saved_wherever_it_falls(tmp_path):
    """Evaluations at 2, 4, ...; saves at 10 only, and where the loss is the best so far."""

    class Fixed(Evaluate):
        def __call__(self, at):
            return {"validation/loss": {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6, 10: 2.7}[at.step]}

    hooks = (Fixed(every=2, batches=list),)
    train(tmp_path, last=10, every=10, hooks=hooks, policy={"best": "validation/loss", "keep_last": 1})
    assert steps(tmp_path / "checkpoints") == [4, 10]


def test_a_row_holds_what_it_says(tmp_path):
    _, tracker = train(tmp_path, last=3, speed=loop.Speed(flops_per_token=10.0, peak_flops=1e15))
    row = tracker.rows[3]
    assert row["tokens"] == 3 * toy.B * toy.T
    assert row["epoch"] == 0.3
    assert row["batch"] == batch_hash(toy.batch(2)) < 2**48
    assert row["tokens_per_second"] == pytest.approx(toy.B * toy.T / row["step_seconds"])
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 10 / 1e15)
    assert row["memory_bytes"] > 1e7
    assert row["weight"] == toy.batch(2).weights.sum()
    assert all(isinstance(x, float) for x in row.values())
    assert {r["batch"] for r in tracker.rows.values()} == {batch_hash(toy.batch(i)) for i in range(3)}


def test_no_mfu_is_shown_where_a_step_is_faster_than_the_ceiling(tmp_path):
    said = []
    _, tracker = train(tmp_path, last=3, speed=loop.Speed(flops_per_token=1e9, peak_flops=1.0), say=said.append)
    assert not any("mfu" in row for row in tracker.rows.values())
    (line,) = [line for line in said if "MFU is not shown" in line]
    assert line.startswith("3 steps were faster than the ceiling")


def test_a_step_takes_its_own_time_also_where_the_device_is_done_at_once(tmp_path):
    """On a CPU small steps are computed while they are dispatched: a save reads two of them in a row."""
    program, tracker = toy.program(), toy.Tracker()

    def slow(*args):
        time.sleep(0.02)
        return jax.block_until_ready(program.step(*args))

    before = time.monotonic()
    loop.train(loop.Job(
        program=program._replace(step=slow), data=toy.Data(), steps=9, workdir=tmp_path, tracker=tracker, guard=Skip(),
        checkpoints=Checkpoints(every=3),
    ))  # fmt: skip
    seconds = [row["step_seconds"] for row in tracker.rows.values()]
    assert min(seconds) >= 0.02
    assert sum(seconds) < time.monotonic() - before


def test_rows_may_be_thinned(tmp_path):
    hook = Evaluate(every=5, batches=lambda: [toy.batch(100)])
    _, tracker = train(tmp_path, last=11, log_every=4, hooks=(hook,))
    assert list(tracker.rows) == [4, 5, 8, 10, 11]


def test_evaluation_is_the_mean_over_all_tokens(tmp_path):
    batches = [toy.batch(100 + i) for i in range(3)]
    batches[1].weights[:] = 0.0
    hook = Evaluate(every=4, batches=lambda: batches)
    state, tracker = train(tmp_path, last=6, hooks=(hook,))
    assert [s for s, row in tracker.rows.items() if "validation/loss" in row] == [4, 6]
    large = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    expected, _ = toy.loss(jax.device_get(state.view), (), large, None)  # the view evaluates its average
    np.testing.assert_allclose(tracker.rows[6]["validation/loss"], expected, rtol=1e-5)
    assert tracker.rows[6]["validation/weight"] == large.weights.sum()
    assert 0 < tracker.rows[6]["validation/loss_se"] < 1
    assert tracker.rows[6]["validation/perplexity"] == math.exp(tracker.rows[6]["validation/loss"])


def test_the_standard_error_of_an_evaluation_is_that_of_a_ratio_of_sums():
    """Against the formula written out, and the textbook's for equal weights."""
    losses, weights = [3.0, 2.5, 4.0, 9.9], [10.0, 30.0, 20.0, 0.0]
    rows = [{"loss": np.float32(x), "weight": np.float32(w)} for x, w in zip(losses, weights, strict=True)]
    mean = (30 + 75 + 80) / 60
    expected = math.sqrt(3 / 2 * sum((w * (x - mean)) ** 2 for x, w in zip(losses, weights, strict=True))) / 60
    np.testing.assert_allclose(loss_estimate(rows), (mean, expected), rtol=1e-12)
    equal = [{**row, "weight": np.float32(7.0)} for row in rows]
    textbook = np.std(np.float32(losses), ddof=1) / np.sqrt(4)
    np.testing.assert_allclose(loss_estimate(equal), (np.mean(np.float32(losses)), textbook), rtol=1e-6)
    assert loss_estimate(rows[3:]) is None


def test_evaluation_changes_nothing(tmp_path):
    hook = Evaluate(every=2, batches=lambda: [toy.batch(100)])
    a, _ = train(tmp_path / "a", last=6)
    b, _ = train(tmp_path / "b", last=6, hooks=(hook,))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_samples_are_written(tmp_path):
    hook = Sample(every=2, generate=lambda params: f"norm {float(jnp.square(params['embed']['table']).sum()) > 0}")
    said = []
    train(tmp_path, last=3, hooks=(hook,), say=said.append)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-2.txt", "step-3.txt"]
    assert said == ["sample after step 2: norm True", "sample after step 3: norm True"]


def test_a_trace_is_written_also_where_the_run_rolls_back_in_it(tmp_path):
    said = []
    hooks = (Profile(start=2, steps=2),)
    train(tmp_path, data=toy.Data(nan=(3,)), last=6, guard=Rollback(), hooks=hooks, every=100, say=said.append)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert said[-1] == f"the trace of steps 3 to 4 is in {tmp_path / 'profile'}"
    assert any(line.startswith("rolled back") for line in said)


@pytest.mark.parametrize(
    ("done", "last", "due"),
    [(0, 100, [10, 15]), (40, 100, [50, 55]), (0, 12, [7, 12]), (90, 100, [95, 100]), (0, 3, [1, 3]), (9, 10, [])],
)
def test_a_trace_starts_and_ends_in_what_is_left_of_the_run(done, last, due):
    hook = Profile.of(done, last)
    assert [step for step in range(done + 1, last + 1) if hook.due(step, last)] == due


def test_a_metric_that_no_row_has_is_never_the_best_and_that_is_said(tmp_path):
    said = []
    train(tmp_path, last=3, policy={"best": "validation/los"}, say=said.append)
    assert "checkpoints.best is 'validation/los', which is no metric; there are: grad_norm, loss, " in said[-1]


def test_multiples_of_keep_every_are_saved(tmp_path):
    train(tmp_path, last=11, every=4, policy={"keep_every": 3, "keep_last": 1})
    assert steps(tmp_path / "checkpoints") == [3, 6, 9, 11]


def test_the_final_checkpoint_is_an_artifact(tmp_path):
    _, tracker = train(tmp_path, last=3)
    ((path, kind, metadata),) = tracker.artifacts
    assert (path, kind, metadata) == (tmp_path / "checkpoints" / "3", "checkpoint", {"step": 3})
    assert json.loads((Path(path) / "extra" / "metadata").read_text())["tracker"] == {"id": "toy"}


def test_the_hash_of_a_batch_is_the_sum_of_those_of_its_parts():
    batch = toy.batch(0)
    half = len(batch.tokens) // 2
    parts = [jax.tree.map(lambda x: x[:half], batch), jax.tree.map(lambda x: x[half:], batch)]
    whole = batch_hash(batch)
    assert whole == sum(batch_hash(part, i * half) for i, part in enumerate(parts)) % 2**48
    assert whole != batch_hash(batch._replace(tokens=batch.tokens[::-1]))  # rows in another order


def test_numbers_survive_the_consensus():
    agree = consensus.make_consensus(toy.program().mesh)
    for flags, number in (((True, False), 2**48 - 1), ((False, True), 1 << 24)):
        assert consensus.read(agree(flags, number)) == (flags, number)
