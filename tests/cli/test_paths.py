"""A path may begin with ~ wherever a user writes one."""

import ast
import shutil
from pathlib import Path

import pytest
from running import ROOT, runtime, slmjax

from slmjax.errors import UserError
from slmjax.files import at


@pytest.mark.fast
def test_there_is_one_place_for_it():
    """Nobody else replaces ~: whoever reads a path of a user calls `files.at`. (platform.py runs before all.)"""
    own = {"files.py", "platform.py"}
    for file in (ROOT / "slmjax").rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert "expanduser" not in names or file.name in own, file


@pytest.mark.fast
def test_at(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert at("~/r2") == Path("/somewhere/r2")
    assert at("a/~/b") == Path("a/~/b")
    with pytest.raises(UserError, match="~nobody-of-this-name/x: there is no home folder of that name"):
        at("~nobody-of-this-name/x")


def test_every_verb_takes_a_path_in_the_home_folder(tiny, tiny_run, tmp_path, monkeypatch):
    """The argument is one word, as a shell passes --out=~/x on. Nothing is written into a folder named ~."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.delenv("SLMJAX_REFERENCE_PYTHON", raising=False)
    shutil.copy(tiny.file, home / "in_the_home_folder.py")
    shutil.copytree(tiny.data_dir, home / "data")
    (home / "prompt.txt").write_text("Call me")
    options = [*map(str, runtime(tiny, "~/run"))]
    options[options.index("--runtime.data-dir") + 1] = "~/data"
    for argv in (
        ("train", "~/in_the_home_folder.py", *options, "--steps=1"),
        ("generate", "~/run", "--prompt-file=~/prompt.txt", "--max-tokens=2"),
        ("export", "~/run", "--out=~/hf"),
        ("import", "~/hf", "--out=~/imported"),
        ("report", "~/run"),
    ):
        done = slmjax(*argv)
        assert done.code == 0, (argv, done.err)
    assert {"run", "hf", "imported"} <= {path.name for path in home.iterdir()}
    assert list(here.iterdir()) == []
