"""`slmjax generate`: prompts in, text out."""

import pytest
from running import slmjax

from slmjax.cli.generate import _unescaped


def test_text_is_streamed_and_repeatable(tiny_run):
    argv = ("generate", tiny_run, "--prompt", "Call me", "--max-tokens", "20")
    done = slmjax(*argv)
    assert done.code == 0, done.err
    assert done.out.startswith("Call me")
    assert "20 tokens" in done.err
    assert slmjax(*argv).out == done.out
    assert slmjax(*argv, "--seed", "1").out != done.out
    assert slmjax(*argv, "--no-stream").out.startswith(done.out.rstrip("\n"))
    assert slmjax(*argv, "--temperature", "0", "--seed", "2").out == slmjax(*argv, "--temperature", "0").out


def test_several_prompts_a_file_and_stop_strings(tiny_run, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("the whale")
    batch = ("generate", tiny_run, "--prompt", "Call me", "--prompt", "It was", "--prompt-file", file)
    done = slmjax(
        *batch,
        "--max-tokens",
        "24",
        "--top-k",
        "20",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.2",
    )
    assert done.code == 0, done.err
    texts = [part.split("\n[")[0] for part in done.out.split("tokens]\n")[:3]]
    assert [text.strip()[:7] for text in texts] == ["Call me", "It was" + texts[1].strip()[6:7], "the wha"]
    stopped = slmjax(*batch, "--max-tokens", "24", "--stop", "e", "--stop", "\\n")
    assert stopped.code == 0, stopped.err
    for part, prompt in zip(stopped.out.split("tokens]\n")[:3], ("Call me", "It was", "the whale"), strict=True):
        assert "e" not in part.strip().removeprefix(prompt).split("\n[")[0]


def test_mistakes_are_named(tiny_run, tmp_path):
    (tmp_path / "latin1").write_bytes("caf\xe9".encode("latin-1"))
    for argv, message in (
        ((tiny_run,), "no prompt; add --prompt"),
        ((tiny_run, "--prompt", "x", "--top-p", "2"), "top_p is 2.0; expected in (0, 1]"),
        ((tiny_run, "--prompt", "x", "--max-tokens", "0"), "--max-tokens is 0"),
        ((tiny_run, "--prompt", "x" * 400), "the model's context is 64"),
        ((tiny_run, "--prompt-file", tmp_path / "none"), "cannot be read as text"),
        ((tmp_path / "none", "--prompt", "x"), "no such folder"),
        ((tiny_run, "--promt", "x"), "--prompt"),
        ((tiny_run, "--prompt", "\udcff"), "is not UTF-8 text"),
        ((tiny_run, "--prompt-file", tmp_path / "latin1"), "cannot be read as text"),
        ((tiny_run, "--prompt", "x", "--stop", "\udcff"), "is not UTF-8 text"),
        ((tiny_run, "--prompt", "x", "--stop", ""), "stop string '' is empty"),
    ):
        done = slmjax("generate", *argv)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1
        assert done.out == "", "a prompt is printed once nothing can be refused"


@pytest.mark.fast
def test_help_shows_an_example():
    done = slmjax("generate", "--help")
    assert done.code == 0
    assert "slmjax generate runs/quickstart --prompt" in done.out


@pytest.mark.parametrize(
    ("given", "meant"),
    [(r"\n", "\n"), (r"é\t", "é\t"), (r"\begin", r"\begin"), (r"\\n", r"\n"), (r"\x", r"\x"), ("日本\n", "日本\n")],
)
def test_escapes_of_stop_strings(given, meant):
    """Line ends and tabs, which a shell makes hard to type; nothing else changes, no letter and no backslash."""
    assert _unescaped(given) == meant
