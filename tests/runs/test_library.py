"""What a notebook calls: train, load, and what a loaded model does, against the command line and transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from running import slmjax as command

import slmjax
from slmjax.config import Tracking
from slmjax.errors import UserError
from slmjax.experiment_file import load_experiment
from slmjax.runs import exporting
from slmjax.runs.loading import load as load_checkpoint


class Counting:
    """Adds a metric after every fourth step."""

    def __init__(self):
        self.seen = []

    def due(self, step, last):
        return step % 4 == 0

    def __call__(self, at):
        self.seen.append(at.step)
        return {"four": at.step / 4}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    experiment, _ = load_experiment(str(tiny.file))
    runtime = slmjax.Runtime(data_dir=str(tiny.data_dir), tracking=Tracking(wandb="disabled"))
    hook = Counting()
    done = slmjax.train(experiment, workdir=tmp_path_factory.mktemp("library") / "run", runtime=runtime, hooks=[hook])
    assert hook.seen == [4, 8, 12]
    return done


def test_a_run_gives_its_metrics_as_arrays(run):
    assert run.metrics["step"].tolist() == list(range(1, 13))
    assert np.isfinite(run.metrics["loss"]).all()
    assert run.metrics["loss"][-1] < run.metrics["loss"][0]
    four = run.metrics["four"]
    assert four[~np.isnan(four)].tolist() == [1, 2, 3]
    assert run.model.loaded.step == 12


def test_the_numbers_are_those_of_the_command_line(run, tiny_run):
    ours, theirs = (load_checkpoint(folder).params for folder in (run.folder, tiny_run))
    np.testing.assert_array_equal(ours["embed"]["table"], theirs["embed"]["table"])
    shown = json.loads(command("eval", run.folder, "--batches", 1, "--json").out)
    assert run.model.evaluate(batches=1).loss.value == pytest.approx(shown["loss"], rel=1e-6)


def test_training_again_has_nothing_to_do(run, tiny, capsys):
    again = slmjax.train(tiny.file, workdir=run.folder, runtime=slmjax.Runtime(data_dir=str(tiny.data_dir)))
    assert "complete, 12 steps; nothing to do" in capsys.readouterr().out
    np.testing.assert_array_equal(again.metrics["loss"], run.metrics["loss"])


def test_text_and_logits(run):
    model = slmjax.load(run.folder)
    one, two = model.generate("Call me", tokens=5), model.generate(["Call me", "The"], tokens=5)
    assert isinstance(one, str)
    assert len(two) == 2
    ids = model.tokenizer.encode("Call me")
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.vocab)
    np.testing.assert_allclose(model.logits([ids])[0], logits, rtol=1e-5, atol=1e-5)
    greedy = model.generate("Call me", tokens=1)
    assert model.tokenizer.decode([int(logits[-1].argmax())]) == greedy
    assert "LoadedModel(" in repr(model)


def test_an_export_is_the_same_model(run, tmp_path):
    folder = run.model.export(tmp_path / "hf", format="hf")
    ids = run.model.tokenizer.encode("It is a truth")
    np.testing.assert_allclose(slmjax.load(folder).logits(ids), run.model.logits(ids), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.logits([0, 10**6]), "ids go from 0 to 1000000; the model's vocabulary is 0 to 383"),
        (lambda model: model.logits([0.5]), "expected integers"),
        (lambda model: model.logits([1] * 65), "65 tokens a row; the model's context is 64"),
        (lambda model: slmjax.train("nowhere.py"), "nowhere.py: no such file"),
        (lambda model: slmjax.train("nowhere.py", hooks=[print]), "is not a hook"),
        (lambda model: slmjax.load("nowhere"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(run, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(run.model)
    assert "\n" not in str(caught.value)


def python(code, **env):
    import os

    clean = {k: v for k, v in os.environ.items() if k not in ("SLMJAX_XLA_FLAGS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env}, check=True
    )


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_each_format_has_the_dtype_that_it_is_written_in_by_default(tmp_path, format):
    check = exporting.FORMATS[format][0]
    check(exporting.Export(out=tmp_path / "new", dtype=exporting.DTYPES[format]))
    with pytest.raises(UserError, match=r"--dtype f16 is"):
        check(exporting.Export(out=tmp_path / "new", dtype="f16"))


def test_importing_it_is_light_and_sets_the_flags():
    done = python(
        "import sys, slmjax, os; print('jax' in sys.modules, bool(os.environ.get('JAX_COMPILATION_CACHE_DIR')))"
    )
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr == ""


def test_importing_jax_first_is_said_in_one_line():
    done = python("import jax, slmjax, slmjax.config")
    assert done.stderr.count("\n") == 1
    assert "import slmjax before jax" in done.stderr


def test_what_there_is_not_is_named():
    with pytest.raises(AttributeError, match="has no attribute 'fit'; it has: "):
        slmjax.fit  # noqa: B018
    assert {"train", "load", "Experiment", "Runtime"} <= set(dir(slmjax))
