"""The step of a population is `jax.vmap` of the step of one run: every optimizer, on one device and on many."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toy

from slmjax import tree
from slmjax.optim.recipes import Adafactor, AdamW, Muon, ScheduleFreeAdamW
from slmjax.optim.schedules import WSD, Constant, Cosine
from slmjax.train import loop, stored
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Skip
from slmjax.train.hooks import Evaluate
from slmjax.train.population import Member, Population
from slmjax.train.signals import Signals

LAST = 4
COSINE = Cosine(peak_lr=1e-2, warmup_steps=1)
KINDS = {
    "adamw": (AdamW(), COSINE, {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.0, "clip_norm": 0.5}),
    "muon": (Muon(), WSD(peak_lr=1e-2), {"momentum": 0.8, "rms": 0.1, "adam_b1": 0.8, "adam_b2": 0.9}),
    "adafactor": (Adafactor(min_factored=8), COSINE, {"decay_power": 0.7, "update_clip": 0.5, "weight_decay": 0.1}),
    "schedule-free": (ScheduleFreeAdamW(), Constant(peak_lr=1e-2), {"b1": 0.8}),
}


def parts(optimizer, schedule, values):
    """The optimizer and the schedule of a run with these values, for the toy's parameters."""
    fields = {name: x for name, x in values.items() if name not in ("seed", "peak_lr")}
    curve = replace(schedule, peak_lr=values["peak_lr"]).build(LAST)
    built = replace(optimizer, **fields).build(curve, *stored.optimized(toy.AXES, toy.EMA))
    return built, curve


def arguments(path):
    return {
        "data": toy.Data(), "steps": LAST, "workdir": path, "tracker": toy.Tracker(), "guard": Skip(),
        "checkpoints": Checkpoints(every=LAST), "say": lambda line: None,
        "hooks": (Evaluate(every=LAST, batches=lambda: [toy.batch(100)]),),
    }  # fmt: skip


def together(path, kind, several, devices):
    optimizer, schedule, _ = KINDS[kind]

    def member(values):
        built, curve = parts(optimizer, schedule, values)
        return Member(toy.init, toy.OBJECTIVE, built, toy.EMA, Skip(), curve, values["seed"])

    population = Population(member, several, devices=devices)
    given = [arguments(path / str(i)) for i in range(len(several))]
    with Signals() as signals:
        runs = [
            loop.training(loop.Job(program=program, **given[i]), population.held(i), signals)
            for i, program in enumerate(population.programs)
        ]
        assert population.train(runs) == [None] * len(several)
    return population, [each["tracker"].rows for each in given]


def clean(rows):
    return {
        step: {name: x for name, x in row.items() if name not in loop.CLOCK} for step, row in rows.items()
    }  # fmt: skip


def close(rows, expected, rtol=1e-4):
    for step, row in clean(expected).items():
        for name, x in row.items():
            np.testing.assert_allclose(rows[step][name], x, rtol=rtol, atol=1e-6, err_msg=f"{name} of step {step}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_among_others_is_the_run_alone(kind, tmp_path):
    optimizer, schedule, changes = KINDS[kind]
    plain = {name: getattr(optimizer, name) for name in changes} | {"seed": 0, "peak_lr": 1e-2}
    other = {**plain, **changes, "seed": 7, "peak_lr": 3e-3}
    population, rows = together(tmp_path, kind, [plain, other], jax.devices()[:1])
    built, curve = parts(optimizer, schedule, other)
    program = toy.program(optimizer=built, schedule=curve, seed=7)
    alone = arguments(tmp_path / "alone")
    state = loop.train(loop.Job(program=program, **alone))
    close(rows[1], alone["tracker"].rows)
    for path, x in tree.flatten(state).items():
        np.testing.assert_allclose(tree.flatten(population.get(1))[path], x, rtol=2e-3, atol=2e-5, err_msg=path)
    assert rows[0][LAST]["loss"] != rows[1][LAST]["loss"]


def test_runs_and_their_rows_are_split_over_devices(tmp_path):
    several = [{"seed": i, "peak_lr": 1e-2} for i in range(4)]
    _, expected = together(tmp_path / "one", "adamw", several, jax.devices()[:1])
    many, rows = together(tmp_path / "many", "adamw", several, jax.devices())
    assert dict(many.mesh.shape) == {"runs": 4, "rows": 2}
    for mine, theirs in zip(rows, expected, strict=True):
        close(mine, theirs)
    for path, x in tree.flatten(many._states).items():
        assert x.addressable_shards[0].data.shape == (1, *x.shape[1:]), path
    # What each program computes alone: the step that the hooks of a run may call.
    _, metrics = many.programs[1].step(many.programs[1].init(), (), many.programs[1].put(toy.batch(0)))
    np.testing.assert_allclose(metrics["loss"], rows[1][1]["loss"], rtol=1e-5)


def test_an_error_outside_the_runs_ends_each_of_them(tmp_path):
    given = [arguments(tmp_path / str(i)) for i in range(2)]

    def member(values):
        return Member(toy.init, toy.OBJECTIVE, toy.OPTIMIZER, toy.EMA, Skip(), lambda step: 0.0, values["seed"])

    population = Population(member, [{"seed": 0}, {"seed": 1}], devices=jax.devices()[:1])
    population._step = lambda *_: 1 / 0
    with Signals() as signals:
        runs = [
            loop.training(loop.Job(program=p, **given[i]), population.held(i), signals)
            for i, p in enumerate(population.programs)
        ]  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            population.train(runs)
    assert [each["tracker"].status for each in given] == ["failed", "failed"]
