"""`slmjax data`: what a person sees."""

import pytest
from data_corpora import sentences, write_jsonl

from slmjax.cli.data import main
from slmjax.data.build_progress import show_progress
from slmjax.errors import DataError, UserError

pytestmark = pytest.mark.fast

RECIPE = """
from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import BPE

def recipe():
    return Recipe(
        name="seafaring",
        sources=(JSONL(name="logbook", path="a.jsonl", licence="CC0-1.0"),),
        tokenizer=BPE(vocab=300),
        validation=0.2,
    )
"""


@pytest.fixture
def built(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))
    texts = sentences(80)
    write_jsonl(tmp_path / "a.jsonl", [*texts, texts[0]])
    (tmp_path / "recipe.py").write_text(RECIPE)
    assert main(["build", str(tmp_path / "recipe.py"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    return tmp_path / "out", capsys.readouterr()


def test_build_reports_and_says_what_to_type_next(built):
    out, shown = built
    assert "80 of 81 documents: 1 exact duplicate; " in shown.out
    assert f"slmjax data show {out}" in shown.out
    assert f'Part(source="{out}")' in shown.out
    assert "tokenising: 1 of 1" in shown.err


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
def test_show_has_statistics_and_packing_boundaries(built, capsys, packing):
    out, _ = built
    assert main(["show", str(out), "--length", "128", "--packing", packing, "--verify"]) == 0
    shown = capsys.readouterr().out
    for expected in ("seafaring", "logbook", "CC0-1.0", "1 exact duplicate", "⟦1⟧", "⟦2⟧", "<|bos|>", "every shard"):
        assert expected in shown


def test_show_validation(built, capsys):
    assert main(["show", str(built[0]), "--split", "validation", "--samples", "1", "--length", "64"]) == 0
    assert capsys.readouterr().out.count("sequence ") == 1


def test_help(capsys):
    assert main([]) == 0
    assert "slmjax data build RECIPE --out DIR" in capsys.readouterr().out
    for verb in ("build", "show"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"slmjax data {verb}" in capsys.readouterr().out


def test_mistakes(built, tmp_path):
    out = str(built[0])
    with pytest.raises(UserError, match="unknown 'sho'; use `slmjax data build`"):
        main(["sho", out])
    with pytest.raises(UserError, match="--lenght"):
        main(["show", out, "--lenght", "3"])
    with pytest.raises(UserError, match="--samples is -1; expected 0 or more"):
        main(["show", out, "--samples", "-1"])
    with pytest.raises(DataError, match=r"data.length is 1"):
        main(["show", out, "--length", "1"])
    with pytest.raises(DataError, match="no token store there"):
        main(["show", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="no such recipe file"):
        main(["build", str(tmp_path / "none.py"), "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--workers is -1"):
        main(["build", str(tmp_path / "recipe.py"), "--out", str(tmp_path / "x"), "--workers", "-1"])


def test_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show_progress() as progress:
        progress("tokenising", 1, None)
        progress("tokenising", 2, 2)
    assert "tokenising" in capsys.readouterr().err


def test_the_shortest_source_and_what_its_build_says(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n***\n".join(sentences(9)) + "\n***\n \x00")
    (tmp_path / "recipe.py").write_text(
        "from slmjax.data.recipe import Recipe\nfrom slmjax.data.sources import Text\n"
        "from slmjax.data.tokenizer import Bytes\n\n\ndef recipe():\n"
        '    return Recipe(name="mine", sources=(Text(path="a.txt"),), tokenizer=Bytes())\n'
    )
    for separator, words in (
        ('"a.txt"', "1 of 1 documents; "),
        ('"a.txt", separator="\\r\\n***\\r\\n"', "9 of 10 documents: 1 empty; "),
    ):
        recipe = tmp_path / "recipe.py"
        recipe.write_text(recipe.read_text().replace('"a.txt"', separator))
        out = tmp_path / str(len(separator))
        assert main(["build", str(recipe), "--out", str(out), "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert words in said
        assert ("does not occur in the file: each file is one document" in said) == ("1 of 1" in said)
        assert "a.txt: its licence is unknown; set licence=" in said
    assert main(["show", str(out), "--samples", "0"]) == 0
    assert "licence is unknown" in capsys.readouterr().out
