"""The command line from dataclasses: every mistake in one line, whatever the terminal; fields that are hard to name."""

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from slmjax.cli import train
from slmjax.cli.args import parse
from slmjax.config import Evaluation, Runtime, Samples
from slmjax.errors import UserError

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Inner:
    heads: int = 3
    """Queries"""
    activation: object = len
    """A function"""


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A folder"""
    out: str
    """Where to write"""
    count: int = 3  # a comment is no help
    share: float | None = None
    kind: Literal["hf", "gguf"] = "hf"
    inner: Inner = field(default_factory=Inner)


def read(*argv):
    return parse(Args, argv, prog="slmjax x", description="About.", example="slmjax x m --out o")


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing: MODEL, --out STR"),
        (["m", "--out"], "--out needs a value"),
        (["m", "--out", "o", "--count", "2.5"], "--count is '2.5'; expected a whole number"),
        (["m", "--out", "o", "--share", "x y"], "--share is 'x y'; expected None or a number"),
        (["m", "--out", "o", "--kind", "zip"], "--kind is 'zip'; expected one of: hf, gguf"),
        (["m", "--out", "o", "--cuont", "3"], "unknown option --cuont; did you mean --count?"),
        (["m", "--out", "o", "--inner.layers=3"], "unknown option --inner.layers; inner has --inner.heads"),
        (["m", "--out", "o", "--nonsense"], "unknown option --nonsense"),
        (["m", "n", "--out", "o"], "unexpected n"),
    ],
    ids=str,
)
def test_a_mistake_names_the_option_the_value_and_what_is_expected(argv, said, encoding, columns, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # ASCII: tyro draws other boxes
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as wrong:
        read(*argv)
    assert str(wrong.value) == f"slmjax x: {said}; `slmjax x --help` lists every field"
    assert os.environ["COLUMNS"] == columns


BOX = "╭─ Error ─╮\n│ --count │\n╰─────────╯"


@pytest.mark.parametrize("columns", ["20", "200"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["m", "--out", "o", "--count", BOX], f"--count is {BOX!r}; expected a whole number"),
        (["m", "--out", "o", "--count", "2\n│ 3"], "--count is '2\\n│ 3'; expected a whole number"),
        (["m", "--out", "o", "--kind", "'│, ('"], "--kind is \"'│, ('\"; expected one of: hf, gguf"),
        (["m", "--out", "o", "--count", "9" * 5000], f"--count is '{'9' * 80}'...; expected a whole number"),
        (["m", "--out", "o", "--kind", "z" * 5000], f"--kind is '{'z' * 80}'...; expected one of: hf, gguf"),
        (["m", "--out", "o", f"--{'x' * 5000}"], f"unknown option '--{'x' * 78}'..."),
        (["m", "--out", "o", "one\ntwo"], "unexpected 'one\\ntwo'"),
        (["m", "--out", "o", "n, --count"], "unexpected 'n, --count'"),
    ],
    ids=["a box", "a line break", "quotes", "long number", "long choice", "long name", "two lines", "a list"],
)
def test_a_message_repeats_any_word_in_one_line(argv, said, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as wrong:
        read(*argv)
    assert str(wrong.value) == f"slmjax x: {said}; `slmjax x --help` lists every field"


@dataclass(frozen=True)
class Schedule:
    peak_lr: float = 1e-3
    warmup: int = 0


@dataclass(frozen=True)
class Late(Schedule):
    start: int = 1

    def __post_init__(self):
        if self.start == 13:
            raise ValueError("start is 13;\nexpected another number")


@dataclass(frozen=True)
class Kinds:
    verbose: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    rules: tuple[tuple[str, int], ...] = ()
    limit: Literal["low", "high"] | None = None
    schedule: Schedule = field(default_factory=Late)
    call: object = len


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--betas", "0.9", "x"], "--betas is '0.9 x'; expected 2 values: a number, a number"),
        (["--betas", "0.9"], "--betas needs 2 values"),
        (["--sizes", "1", "x"], "--sizes is '1 x'; expected any number of values, each a whole number"),
        (["--rules", "a", "b"], "--rules is 'a b'; expected any number of groups of 2 values: text, a whole number"),
        (["--limit", "mid"], "--limit is 'mid'; expected one of: None, low, high"),
        (["--verbose=maybe"], "--verbose takes no value; it is given 'maybe'"),
        (["--schedule.peak_lr=fast"], "--schedule.peak-lr is 'fast'; expected a number"),
        (["--schedule.start", "1", "--schedule.start", "x"], "--schedule.start is 'x'; expected a whole number"),
        (["--schedule.start", "13"], "start is 13; expected another number"),
        (["--peak-lr", "1"], "unknown option --peak-lr; did you mean --schedule.peak-lr?"),
        (["--scedule.warmup", "1"], "unknown option --scedule.warmup; did you mean --schedule.warmup?"),
        (
            ["--schedule.call", "1"],
            "unknown option --schedule.call; schedule has --schedule.peak-lr, --schedule.warmup, --schedule.start",
        ),
    ],
    ids=str,
)
def test_each_kind_of_value(argv, said):
    with pytest.raises(UserError) as wrong:
        parse(Kinds, argv, prog="slmjax x", description="About.", example="slmjax x", default=Kinds())
    assert str(wrong.value) == f"slmjax x: {said}; `slmjax x --help` lists every field"


def test_none_and_subclasses_are_read():
    words = ["--limit", "None", "--schedule.start", "5", "--rules", "a", "1", "b", "2"]
    read_ = parse(Kinds, words, prog="x", description="", example="", default=Kinds(limit="low"))
    assert read_ == Kinds(schedule=Late(start=5), rules=(("a", 1), ("b", 2)))


def test_a_misspelt_option_that_is_required_is_named_too():
    with pytest.raises(UserError, match="missing: --out STR; unknown option --ot; did you mean --out"):
        read("m", "--ot", "o")


def test_without_its_private_module_tyro_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.delattr(tyro, "_errors")
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    with pytest.raises(SystemExit) as stop:
        read("m", "--out", "o", "--count", "2.5")
    assert stop.value.code == 2
    assert "2.5" in capsys.readouterr().err


def test_help_shows_what_can_be_given(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "MODEL" in shown
    assert "a comment is no help" not in shown
    assert "activation" not in shown


EXPERIMENT = """
from slmjax.config import Experiment
from slmjax.data.recipe import Recipe
from slmjax.data.sources import Text
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import Cosine

RECIPE = Recipe(name="r", sources=(Text(path="*.txt", licence="CC0-1.0"),))

def experiment():
    return Experiment(
        name="x",
        model=llama(layers=1, width=16, heads=2, kv_heads=2, hidden=16, vocab=300, context=16),
        data=PackedText(train=(Part(source="store"), Part(source=RECIPE, weight=2.0)), length=16, batch=2),
        schedule=Cosine(peak_lr=1e-3),
        steps=2,
    )
"""


def test_the_data_of_an_experiment_can_be_overridden(tmp_path):
    file = tmp_path / "overridden.py"
    file.write_text(EXPERIMENT)
    experiment, _, _ = train.parse([str(file)], "slmjax train", "", "")
    parts, _, _ = train.parse([str(file), "--data.train.0.source", "other"], "slmjax train", "", "")
    assert parts.data.train[0].source == "other"
    assert parts.data.train[1] == experiment.data.train[1]
    with pytest.raises(UserError, match="unexpected stray"):
        train.parse([str(file), "stray"], "slmjax train", "", "")


def test_help_of_an_experiment_says_what_its_fields_are(tmp_path, capsys):
    file = tmp_path / "with_help.py"
    file.write_text(EXPERIMENT)
    with pytest.raises(SystemExit):
        train.parse([str(file), "--help"], "slmjax train", "", "")
    shown = capsys.readouterr().out
    assert "--data.train.0.source STR" in shown
    assert "--data.train.1.source STR" in shown
    assert not re.search("noqa|fixed to| at 0x", shown)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Runtime(log_every=0), "runtime.log_every is 0; expected at least 1"),
        (lambda: Evaluation(every=-1), "evaluation.every is -1; expected at least 0"),
        (lambda: Evaluation(batches=0), "evaluation.batches is 0; expected at least 1"),
        (lambda: Samples(tokens=0), "runtime.samples.tokens is 0; expected at least 1"),
        (lambda: Samples(temperature=float("nan")), "runtime.samples.temperature is nan; expected at least 0"),
    ],
    ids=["log_every", "every", "batches", "tokens", "temperature"],
)
def test_counts_that_make_no_sense(make, said):
    with pytest.raises(UserError, match=said):
        make()


def slmjax(*args, **kwargs):
    """As the installed command does it: the working directory is not on Python's path."""
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path[0] = {root!r}; from slmjax.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, **kwargs)


def test_a_module_in_the_working_directory_is_an_experiment(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    out = slmjax("inspect", "mine:experiment", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "embed/table" in out.stdout


def test_what_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.\n\nAnd more.")
    recipe = "from slmjax.data.recipe import Recipe\nfrom slmjax.data.sources import Text\ndef recipe():\n"
    recipe += "    return Recipe(name='r', sources=(Text(path='a.txt', licence='CC0-1.0'),))\n"
    (tmp_path / "recipe.py").write_text(recipe)
    out = slmjax("data", "build", "recipe.py", "--out", "/proc/nowhere", cwd=tmp_path)
    assert out.returncode == 5
    assert out.stderr.splitlines()[-1] == "slmjax: error: /proc/nowhere.building: No such file or directory"
    assert "Traceback" not in out.stderr
