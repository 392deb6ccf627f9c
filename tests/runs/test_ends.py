"""Every text ends at the same tokens: EOS, and those that the model names from which a run starts."""

import json
import shutil
from dataclasses import replace

import pytest

import slmjax
from slmjax.config import Evaluation, Runtime, Samples, Tracking
from slmjax.data.generation_config import NOTHING_SAID, GenerationConfig, end_tokens
from slmjax.data.tokenizer import Tokenizer
from slmjax.distill.objective import Distill
from slmjax.distill.sequences import OnPolicy
from slmjax.evals.generate import Generator
from slmjax.experiment_file import load_experiment
from slmjax.nn.compute import Compute
from slmjax.objectives import NextToken
from slmjax.optim.schedules import Constant
from slmjax.runs import beginning, launch
from slmjax.start import FromModel
from slmjax.types import Special

EVERY = list(range(384))
"""As end tokens: a text ends with its first token, whatever that is"""


@pytest.fixture(scope="module")
def model(tiny_run, tmp_path_factory):
    """A folder of a model whose generation_config.json names every token as an end."""
    folder = tmp_path_factory.mktemp("ends") / "model"
    shutil.copytree(tiny_run, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EVERY}))
    return folder


@pytest.fixture(scope="module")
def given(tiny, model, tmp_path_factory):
    """The experiment that starts from the model and learns from it on its own text, and a runtime with samples."""
    base, _ = load_experiment(str(tiny.file))
    objective = Distill(teachers=(str(model),), sequences=OnPolicy(prompt=8, new_tokens=8))
    runtime = Runtime(
        workdir=str(tmp_path_factory.mktemp("ends-run") / "run"), data_dir=str(tiny.data_dir), dtype="float32",
        tracking=Tracking(wandb="disabled"), samples=Samples(every=1, prompts=("The whale",), tokens=9),
    )  # fmt: skip
    changes = {"steps": 1, "evaluation": Evaluation(every=0), "schedule": Constant(peak_lr=1e-3)}
    return replace(base, start=FromModel(model=str(model)), objective=objective, **changes), runtime


def test_eos_comes_first_and_nothing_twice():
    assert end_tokens(2) == (2,)
    assert end_tokens(2, (7, 2, 5, 7)) == (2, 7, 5)
    assert end_tokens(None, (7,)) == (7,)
    assert end_tokens(None) == ()


def test_texts_that_a_student_writes_end_at_them_unless_it_says_others(given):
    experiment, runtime = given
    ready = launch.prepare(experiment, runtime, None)
    assert sorted(ready.with_models(Compute()).objective.spec.sequences.ends) == EVERY
    assert OnPolicy(ends=(5,)).with_special(Special(ends=(1, 2))).ends == (5,)


def test_samples_during_training_end_at_them(given, monkeypatch):
    """And the run knows them when the model is no longer there."""
    experiment, runtime = given
    made = []
    first = Generator.__call__

    def noted(self, *args, **options):
        made.extend(first(self, *args, **options))
        return made

    monkeypatch.setattr(Generator, "__call__", noted)
    run = slmjax.train(replace(experiment, objective=NextToken()), runtime=runtime)
    assert [(len(text.tokens), text.reason) for text in made] == [(1, "eos")]
    tokenizer = Tokenizer.load(run.folder)
    others = GenerationConfig(said={"eos_token_id": [7]})
    for left in (beginning.Beginning("0" * 64, None), beginning.Beginning("0" * 64, {}, others, tokenizer.fingerprint)):
        assert beginning.told(left, tokenizer, run.folder).ends == tuple(EVERY), "a resumed run goes by its own copy"


@pytest.mark.parametrize("where", ["said", "ids"])
def test_ids_of_another_tokenizer_are_no_ends(model, tmp_path, where):
    tokenizer, said = Tokenizer.load(model), GenerationConfig(**{where: {"eos_token_id": [7]}})
    for fingerprint, ends in ((tokenizer.fingerprint, (7,)), ("another", ())):
        start = beginning.Beginning("0" * 64, {}, said, fingerprint)
        found = beginning.told(start, tokenizer, tmp_path)
        assert found.ends == ends
        assert tuple(found.said.get("eos_token_id", ())) == ends, "what the run's folder keeps"
    assert beginning.told(None, tokenizer, tmp_path) == NOTHING_SAID
