"""NaN and spikes, by each policy: refused inside the step, then skipped, rolled back or halted by the loop."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy

from slmjax.errors import Diverged, UserError
from slmjax.train import loop
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import steps
from slmjax.train.guard import Halt, Rollback, Skip
from slmjax.train.rows import batch_hash

pytestmark = pytest.mark.fast


def run(workdir, guard, data, last=12, every=4):
    tracker, said = toy.Tracker(), []
    state = loop.train(loop.Job(
        program=toy.program(guard=guard), data=data, steps=last, workdir=workdir, tracker=tracker, guard=guard,
        checkpoints=Checkpoints(every=every), say=said.append,
    ))  # fmt: skip
    return state, tracker, said


def test_a_bad_step_changes_nothing_but_the_counters():
    program = toy.program()
    state, _ = program.step(program.init(), (), program.put(toy.batch(0)))
    before = jax.device_get(state)
    bad = toy.batch(1)
    bad.weights[2, 0] = np.nan
    state, metrics = program.step(state, (), program.put(bad))
    after = jax.device_get(state)
    for a, b in ((before.params, after.params), (before.view, after.view), (before.opt.optimizer, after.opt.optimizer)):
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert metrics["good"] == 0
    assert after.step == 2
    assert (after.opt.guard.skipped, after.opt.guard.consecutive, after.opt.guard.good) == (1, 1, 1)


def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is():
    guard = Skip()
    good, state = guard.check(guard.init(), jnp.float32(1.0), jnp.float32(np.inf))
    assert not good
    good, state = guard.check(state, jnp.float32(1.0), jnp.float32(1.0))
    assert good
    assert (int(state.good), int(state.skipped), int(state.consecutive)) == (1, 1, 0)


@pytest.mark.parametrize("spiking", [0, 1])
def test_spikes_are_found_where_numpy_finds_them(spiking):
    """A window of the last 16 good values, 6 standard deviations (of at least a thousandth of the loss, half of the
    gradient norm), against a plain reimplementation."""
    guard, rng = Skip(sigma=6.0, window=16), np.random.default_rng(0)
    check, state = jax.jit(guard.check), guard.init()
    window: list[np.ndarray] = []
    verdicts = []
    for i in range(200):
        now = rng.normal([3.0, 1.0], [0.1, 0.05]).astype(np.float32)
        now[spiking] += rng.choice([0.0, 0.2, 1.0, 5.0], p=[0.85, 0.05, 0.05, 0.05])
        recent = np.array(window[-16:], np.float64)
        floor = np.array([1e-3, 0.5]) * recent.mean(0) if window else 0.0
        limit = recent.mean(0) + 6 * np.maximum(recent.std(0), floor) if len(window) >= 8 else np.inf
        expected = bool((now <= limit).all())
        good, state = check(state, now[0], now[1])
        assert bool(good) == expected, i
        if expected:
            window.append(now)
        verdicts.append(expected)
    assert 5 < verdicts.count(False) < 60


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": -1.0}, {"window": 1}])
def test_policies_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=f"guard.{next(iter(wrong))} is "):
        Skip(**wrong)


def test_without_sigma_only_nan_and_inf_are_bad():
    guard = Skip(sigma=None, window=4)
    state = guard.init()
    for _ in range(8):
        _, state = guard.check(state, jnp.float32(1.0), jnp.float32(1.0))
    assert guard.check(state, jnp.float32(1e6), jnp.float32(1.0))[0]


def test_skip_goes_on_says_so_and_keeps_the_evidence(tmp_path):
    _, tracker, said = run(tmp_path, Skip(), toy.Data(nan=(5,)))
    assert [row["skipped"] for row in tracker.rows.values()] == [0] * 5 + [1] * 7
    assert math.isnan(tracker.rows[6]["loss"])
    assert all(math.isfinite(tracker.rows[s]["loss"]) for s in tracker.rows if s != 6)
    evidence = tmp_path / "evidence" / "step-6"
    assert said == [
        f"step 6: loss nan, gradient norm nan: the guard skips this update; batch and metrics are in {evidence}"
    ]
    kept = np.load(evidence / "batch-0.npz")
    np.testing.assert_array_equal(kept["tokens"], toy.batch(5).tokens)
    assert np.isnan(kept["weights"]).any()
    assert json.loads((evidence / "metrics-0.json").read_text())["loss"] == "nan"
    assert tracker.status == "complete"


def test_skip_gives_up_after_its_limit_in_a_row(tmp_path):
    with pytest.raises(Diverged, match=r"step 8: .* Skip gives up after 3 bad steps in a row") as raised:
        run(tmp_path, Skip(limit=3), toy.Data(nan=(2, 5, 6, 7)))
    assert raised.value.code == 3
    assert steps(tmp_path / "checkpoints") == [4]


def test_halt_stops_at_the_first(tmp_path):
    with pytest.raises(Diverged, match=r"step 4: .* Halt gives up"):
        run(tmp_path, Halt(), toy.Data(nan=(3,)), every=2)
    assert steps(tmp_path / "checkpoints") == [2]


def test_a_spike_rolls_back_and_skips_the_data_around_it(tmp_path):
    """12 steps, a checkpoint every 4; the 11th batch spikes: steps 9, 10, ... run again, on batches 11, 12, ..."""
    guard = Rollback(window=8)
    state, tracker, said = run(tmp_path, guard, toy.Data(spikes=(10,)), last=12)
    assert said[-1] == "rolled back to step 8; the data up to the batch of step 11 are skipped"
    assert tracker.resumed == [0, 8]
    seen = {step: row["batch"] for step, row in tracker.rows.items()}
    used = [*range(8), 11, 12, 13, 14]
    assert seen == {i + 1: batch_hash(toy.batch(b)) for i, b in enumerate(used)}

    program = toy.program(guard=guard)
    expected = program.init()
    for b in used:
        expected, _ = program.step(expected, (), program.put(toy.batch(b)))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rollback_before_the_first_checkpoint_starts_over(tmp_path):
    _, tracker, said = run(tmp_path, Rollback(), toy.Data(nan=(1,)), last=4, every=100)
    assert said[-1].startswith("rolled back to step 0")
    assert [row["batch"] for row in tracker.rows.values()] == [batch_hash(toy.batch(b)) for b in (2, 3, 4, 5)]


def test_rollbacks_are_bounded(tmp_path):
    with pytest.raises(Diverged, match="Rollback gives up after 1 bad steps in a row, 2 rollbacks"):
        run(tmp_path, Rollback(retries=2), toy.Data(nan=range(5, 100)))
    assert sorted(p.name for p in (tmp_path / "evidence").iterdir()) == ["step-5-retry-1", "step-5-retry-2", "step-6"]
