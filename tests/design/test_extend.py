"""The design is proved: a new kind of weights and a new objective, each in one file, trained by `slmjax train`.

docs/extend.md shows the files.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT, slmjax

from slmjax import tree
from slmjax.experiment_file import load_experiment, load_module
from slmjax.track.jsonl import read
from slmjax.train.checkpoint_folder import restore_params
from slmjax.types import Batch

INT4 = ROOT / "tests" / "design" / "int4_weights.py"
DISTILLED = ROOT / "tests" / "design" / "distilled.py"
DATA = ROOT / ".cache" / "test-data"
"""The quickstart's token store is built once, in seconds, and kept: its name is a hash of what it is made from"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Runs a file's experiment at a size for tests -> the run folder."""
    folder = tmp_path_factory.mktemp("design")

    def train(file, name, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            done = slmjax(
                "train", file, "--runtime.workdir", folder / name, "--runtime.data-dir", DATA,
                "--runtime.tracking.wandb", "disabled", "--data.batch", 8,
                "--data.length", 32, "--steps", 30, "--schedule.warmup-steps", 3, "--evaluation.every", 15,
                "--evaluation.batches", 2, "--model.repeats", 2, *more,
            )  # fmt: skip
        assert done.code == 0, done.err
        return folder / name

    return train


@pytest.fixture(scope="module")
def int4(small):
    return small(INT4, "int4")


@pytest.fixture(scope="module")
def teacher(small):
    return small(ROOT / "experiments/pretrain/quickstart.py", "teacher")


@pytest.fixture(scope="module")
def student(small, teacher):
    before = contents(teacher)
    folder = small(DISTILLED, "student", "--objective.teacher", teacher)
    assert contents(teacher) == before
    return folder


def contents(folder):
    files = sorted(p for p in (folder / "checkpoints").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("file", [INT4, DISTILLED])
def test_one_file_of_at_most_sixty_lines_that_slmjax_knows_nothing_of(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert f"```python\n{text}```" in (ROOT / "docs" / "extend.md").read_text(), "docs/extend.md is out of step"
    own = "Int4Weights" if file is INT4 else "Distill("
    assert own in text
    assert not [p for p in (ROOT / "slmjax").rglob("*.py") if own in p.read_text()]


def losses(folder, name="loss"):
    return [row[name] for row in read(folder / "metrics.jsonl") if name in row]


def test_int4_weights_train(int4):
    loss, validation = losses(int4), losses(int4, "validation/loss")
    assert len(loss) == 30
    assert loss[0] == pytest.approx(math.log(4096), abs=0.5)
    assert np.mean(loss[-5:]) < loss[0] - 1
    assert validation[1] < validation[0]


def test_int4_weights_take_at_most_sixteen_values_a_row(int4):
    view = load_module(INT4).Int4Weights()
    stored = jax.tree.map(jnp.asarray, restore_params(int4 / "checkpoints"))
    effective = tree.flatten(view.build().evaluate(stored, ()))
    quantized = [path for path in effective if tree.matches(path, view.patterns)]
    assert {path.split("/")[-1] for path in quantized} == {"q", "k", "v", "o", "gate", "up", "down"}
    for path, w in tree.flatten(stored).items():
        rows = np.asarray(effective[path]).reshape(-1, w.shape[-1])
        if path not in quantized:
            np.testing.assert_array_equal(effective[path], w)
            continue
        assert max(len(np.unique(np.round(r, 9))) for r in rows) <= 16
        assert len(np.unique(np.asarray(w).reshape(-1, w.shape[-1])[0])) > 16
        step = np.abs(np.asarray(w)).max(-1, keepdims=True) / 7.5
        assert np.all(np.abs(effective[path] - w) <= 0.5001 * step + 1e-9)


def test_the_gradient_goes_straight_through():
    view = load_module(INT4).Int4Weights().build()
    rng = np.random.default_rng(0)
    params = {"layers": {"attn": {"q": jnp.float32(rng.normal(size=(2, 4, 2, 8)))}}}
    cotangent = jnp.float32(rng.normal(size=(2, 4, 2, 8)))
    grads = jax.grad(lambda p: jnp.sum(view.apply(p, ())["layers"]["attn"]["q"] * cotangent))(params)
    np.testing.assert_array_equal(grads["layers"]["attn"]["q"], cotangent)


def test_a_run_of_an_own_view_replays_from_its_config(int4, small):
    again = slmjax("train", int4 / "config.json", "--code", INT4, "--runtime.workdir", int4)
    assert again.code == 0, again.err
    assert "complete, 30 steps; nothing to do" in again.out


def test_the_student_learns_from_the_teacher(student):
    loss, validation = losses(student), losses(student, "validation/loss")
    assert len(loss) == 30
    assert np.mean(loss[-5:]) < 0.5 * loss[0]
    assert validation[1] < validation[0]


def test_the_teacher_is_frozen(student, teacher):
    """The step gives back its parameters untouched; they are what the loss is pulled to."""
    from slmjax.config import Runtime
    from slmjax.runs.launch import build

    load_module(DISTILLED)
    experiment, _ = load_experiment(str(student / "config.json"))
    built = build(experiment, Runtime())
    everywhere = jax.sharding.NamedSharding(built.program.mesh, jax.sharding.PartitionSpec())
    frozen = jax.device_put(built.objective.frozen, everywhere)
    saved = jax.tree.map(np.asarray, restore_params(teacher / "checkpoints"))
    jax.tree.map(np.testing.assert_array_equal, frozen, saved)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 384, (8, 33), dtype=np.int32)
    ones = np.ones((8, 32), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.float32(ones), np.cumsum(ones, 1, dtype=np.int32) - 1, ones)
    state = built.program.init()
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = built.program.step(state, frozen, built.program.put(batch))
    assert metrics["good"] == 1
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)))
    jax.tree.map(np.testing.assert_array_equal, frozen, saved)


def test_a_student_that_equals_the_teacher_has_nothing_to_learn(teacher):
    experiment, _ = load_experiment(str(teacher / "config.json"))
    model = experiment.model.build()
    objective = load_module(DISTILLED).Distill(teacher=str(teacher)).build(model)
    params = jax.tree.map(jnp.asarray, objective.frozen)
    ones = jnp.ones((2, 16), jnp.int32)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = Batch(tokens, tokens, jnp.float32(ones), jnp.cumsum(ones, 1) - 1, ones)
    (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, params, batch, jax.random.key(0))
    assert abs(loss) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
