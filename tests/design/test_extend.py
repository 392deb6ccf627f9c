"""The design is proved: a new kind of weights and a new objective, each in one file, trained by `slmjax train`.

docs/extend.md shows the files.
"""

import hashlib
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT, slmjax

from slmjax import tree
from slmjax.config import Runtime
from slmjax.experiment_file import load_experiment, load_module
from slmjax.optim.matrices import matrix
from slmjax.runs.build import build
from slmjax.runs.loading import load
from slmjax.track.jsonl import read
from slmjax.train import stored
from slmjax.train.checkpoint_folder import restore_params
from slmjax.types import Batch

INT4 = ROOT / "tests" / "design" / "int4_weights.py"
DISTILLED = ROOT / "tests" / "design" / "distilled.py"


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
    own = "Int4Weights" if file is INT4 else "MatchLogits("
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


def test_int4_weights_take_at_most_sixteen_values_an_output_channel(int4):
    view = load_module(INT4).Int4Weights()
    experiment, _ = load_experiment(str(int4 / "config.json"))
    params, own = stored.parts(jax.tree.map(jnp.asarray, restore_params(int4 / "checkpoints")))
    effective = tree.flatten(view.build(experiment.model.axes()).evaluate(params, own, ()))
    axes = tree.flatten(experiment.model.axes(), is_leaf=tree.is_axes)
    scales = tree.flatten(own)
    assert {path.split("/")[-1] for path in scales} == {"q", "k", "v", "o", "gate", "up", "down"}
    for path, w in tree.flatten(params).items():
        if path not in scales:
            np.testing.assert_array_equal(effective[path], w)
            continue
        scale = np.expand_dims(np.exp(scales[path]), matrix(axes[path]).rows)
        codes = np.asarray(effective[path] / scale)
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
        assert codes.min() >= -8.001
        assert codes.max() <= 7.001
        inside = np.abs(np.round(codes)) < 7
        assert np.all((np.abs(effective[path] - w) <= 0.5001 * np.broadcast_to(scale, w.shape))[inside])


def test_the_scales_are_learned_without_weight_decay_and_evaluated(int4):
    """They move, all of them; and `slmjax eval` sees the same loss as the run did, so it has its grid."""
    module = load_module(INT4)
    experiment, _ = load_experiment(str(int4 / "config.json"))
    built = build(experiment, Runtime())
    _, first = stored.parts(built.program.init().params)
    _, last = stored.parts(restore_params(int4 / "checkpoints"))
    moved = jax.tree.map(lambda a, b: float(np.mean(np.asarray(a) != np.asarray(b))), first, last)
    assert min(jax.tree.leaves(moved)) > 0.9
    groups = tree.flatten(module.Int4Weights().build(experiment.model.axes()).groups, is_leaf=lambda x: True)
    assert groups
    done = slmjax("eval", int4, "--code", INT4)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("v", "in_s", "in_w"), [(2.3, -0.3, 1.0), (-3.6, -0.4, 1.0), (9.0, 7.0, 0.0), (-11.0, -8.0, 0.0)]
)
def test_the_gradients_are_those_of_the_paper(v, in_s, in_w):
    s = 0.25
    slopes = jax.grad(load_module(INT4).fake_quant, argnums=(0, 1))(jnp.float32(v * s), jnp.float32(s))
    np.testing.assert_allclose(slopes, (in_w, in_s), rtol=1e-5, atol=1e-5)


def test_int4_training_resumes_bit_for_bit(int4, small):
    half = small(INT4, "int4-half", "--steps", 30, "--runtime.checkpoints.every", 10)
    for step in ("20", "30"):
        shutil.rmtree(half / "checkpoints" / step)
    again = small(INT4, "int4-half", "--steps", 30, "--runtime.checkpoints.every", 10)
    assert losses(again) == losses(int4)
    saved = (restore_params(folder / "checkpoints") for folder in (again, int4))
    jax.tree.map(np.testing.assert_array_equal, *saved)


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


def test_a_student_opens_when_its_teacher_is_gone(student, teacher):
    """Evaluation and export need the model, its optimizer and its view; not what it was trained towards."""
    load_module(DISTILLED)
    moved = teacher.rename(teacher.with_name("elsewhere"))
    try:
        assert load(student).step == 30
    finally:
        moved.rename(teacher)


def test_a_student_that_equals_the_teacher_has_nothing_to_learn(teacher):
    experiment, _ = load_experiment(str(teacher / "config.json"))
    model = experiment.model.build()
    objective = load_module(DISTILLED).MatchLogits(teacher=str(teacher)).build(model)
    params = jax.tree.map(jnp.asarray, objective.frozen)
    ones = jnp.ones((2, 16), jnp.int32)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = Batch(tokens, tokens, jnp.float32(ones), jnp.cumsum(ones, 1) - 1, ones)
    (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, params, batch, jax.random.key(0))
    assert abs(loss) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
