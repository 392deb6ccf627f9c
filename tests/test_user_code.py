"""Mistakes in files of the user: one line with the place, for experiments and recipes alike."""

import subprocess
import sys

import pytest

from slmjax.data.recipe import load_recipe
from slmjax.errors import UserError
from slmjax.experiment_file import load_value

pytestmark = pytest.mark.fast

MISTAKES = {
    "a name": ("    return undefined", ":2: NameError: name 'undefined' is not defined"),
    "a key": ("    return {}['x']", ":2: KeyError: 'x'"),
    "an import": ("    import not_there_at_all", ":2: ModuleNotFoundError: No module named 'not_there_at_all'"),
    "an assertion": ("    assert 1 == 2", ":2: AssertionError"),
    "syntax": ("    return (", ":2: '(' was never closed"),
    "an argument": ("    return dict(1, 2, 3)", ":2: TypeError: dict expected at most 1 argument, got 3"),
    "deeper": ("    return inner()\ndef inner():\n    return 1 / 0", ":4: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("kind", ["experiment", "recipe"])
@pytest.mark.parametrize(("body", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_names_file_and_line(kind, body, said, tmp_path):
    file = tmp_path / f"{tmp_path.name}.py"  # a module of that name is made
    file.write_text(f"def {kind}():\n{body}\n")
    with pytest.raises(UserError) as wrong:
        load_value(str(file), kind) if kind == "experiment" else load_recipe(file)
    assert str(wrong.value) == f"{file}{said}"


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_more.py").write_text("\nimport not_there_at_all\n")
    with pytest.raises(UserError, match=r"^needs_more:2: ModuleNotFoundError: No module named 'not_there_at_all'$"):
        load_value("needs_more:experiment", "experiment")
    for ref in ("nowhere:experiment", "no.where:experiment", ".nowhere:x", ":experiment"):
        with pytest.raises(UserError, match="expected a Python file, module:function"):
            load_value(ref, "experiment")


def test_a_recipe_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "names_beside.py").write_text("NAME = 'beside'")
    file = tmp_path / "recipe_beside.py"
    file.write_text(
        "from names_beside import NAME\nfrom slmjax.data.recipe import Recipe\nfrom slmjax.data.sources import Text\n"
        "def recipe(): return Recipe(name=NAME, sources=(Text(path='*', licence='CC0-1.0'),))"
    )
    assert load_recipe(file).name == "beside"


def test_a_recipe_of_the_wrong_types(tmp_path):
    """In a process of its own: where the tests run, all annotations are checked, which users do not have."""
    wrong = {
        "sources=Text(path='a', licence='x')": "sources is Text",
        "sources=('a.txt',)": "sources has 'a.txt'; expected Text, JSONL, Parquet, Folder or Hub",
        "sources=(Text(path='a', licence='x'),), tokenizer='bpe'": "tokenizer has 'bpe'; expected Bytes, BPE or File",
        "sources=(Text(path='a', licence='x'),), dedup=False": "dedup has False; expected Dedup or None",
    }
    for number, fields in enumerate(wrong):
        (tmp_path / f"{number}.py").write_text(
            "from slmjax.data.recipe import Recipe\nfrom slmjax.data.sources import Text\n"
            f"def recipe(): return Recipe(name='r', {fields})"
        )
    code = """if True:
        import sys
        from slmjax.data.recipe import load_recipe
        from slmjax.errors import DataError
        for file in sys.argv[1:]:
            try:
                load_recipe(file)
            except DataError as error:
                print(error)
    """
    files = [str(tmp_path / f"{number}.py") for number in range(len(wrong))]
    out = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert len(lines) == len(wrong)
    for line, said in zip(lines, wrong.values(), strict=True):
        assert line.startswith(f"recipe 'r': {said}")
