"""The command itself: help, start-up, and mistakes as one line with exit code 2."""

import subprocess
import sys

import pytest

from slmjax.cli import main as cli

pytestmark = pytest.mark.fast


def slmjax(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "slmjax.cli.main", *args], capture_output=True, text=True, **kwargs)


def test_help_lists_every_verb():
    out = slmjax("--help")
    assert out.returncode == 0
    for verb, (_, what) in cli.VERBS.items():
        assert f"  {verb}" in out.stdout
        assert what in out.stdout


def test_help_imports_nothing_heavy():
    code = "import sys; from slmjax.cli.main import run; run(['--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "numpy", "tyro", "wandb", "rich", "datasets", "tensorstore", "grain"}
    assert not heavy & set(eval(out.stdout.splitlines()[-1]))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_help_with_an_example(verb):
    sub = {"data": ["data", "build"], "verify": ["verify", "resume"], "sweep": ["sweep", "plan"]}.get(verb, [verb])
    out = slmjax(*sub, "--help")
    assert out.returncode == 0, out.stderr
    assert f"slmjax {' '.join(sub)} " in out.stdout.replace("\n", " ")
    assert "xample" in out.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["nonsense"], ["'nonsense'", "the verbs are"]),
        (["train", "nowhere.py"], ["nowhere.py", "no such file"]),
        (["eval", "no_such_folder", "--data", "x"], ["no_such_folder"]),
        (["eval", "x", "--daata", "y"], ["--daata", "--data"]),
        (["train", "--code"], ["--code", "Python file"]),
    ],
    ids=lambda x: " ".join(x) if x and x[0].isalpha() else "",
)
def test_a_mistake_is_one_line(args, words, tmp_path):
    out = slmjax(*args, cwd=tmp_path)
    assert out.returncode == 2
    assert out.stderr.count("\n") == 1, out.stderr
    assert "Traceback" not in out.stderr
    for word in words:
        assert word in out.stderr
    assert not list(tmp_path.iterdir())
