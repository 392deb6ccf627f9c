"""GGUF files and chats on the command line."""

import io
import sys

import pytest
from running import slmjax

from slmjax.convert import gate

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def without_reference(monkeypatch):
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def file(tiny_run, tmp_path_factory):
    """The tiny run as a GGUF file."""
    out = tmp_path_factory.mktemp("exports") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(gate.ENVIRONMENT, raising=False)
        done = slmjax("export", tiny_run, "--format", "gguf", "--out", out)
    assert done.code == 0, done.err
    assert "reload: tensors (float32)" in done.out
    assert f"exported to {out}" in done.out
    return out


@pytest.fixture(scope="module")
def chatty(file, tmp_path_factory):
    """The tiny model imported, with a chat template put beside it."""
    folder = tmp_path_factory.mktemp("imports") / "tiny"
    done = slmjax("import", file, "--out", folder)
    assert done.code == 0, done.err
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_run_file_and_import_generate_the_same(tiny_run, file, chatty):
    argv = ("--prompt", "Call me", "--max-tokens", "20", "--seed", "3")
    expected = slmjax("generate", tiny_run, *argv)
    assert expected.code == 0, expected.err
    for model in (file, chatty):
        found = slmjax("generate", model, *argv)
        assert (found.code, found.out) == (0, expected.out), found.err
    assert slmjax("inspect", file).code == 0


def test_a_question_gets_the_answer_alone(chatty):
    argv = ("generate", chatty, "--temperature", "0", "--max-tokens", "8")
    done = slmjax(*argv, "--chat", "Whale?")
    assert done.code == 0, done.err
    prompt = "user: Whale?<|eos|>assistant: "
    whole = slmjax(*argv, "--prompt", prompt)
    assert "Whale" not in done.out
    assert done.out.strip() != whole.out.strip()
    told = slmjax(*argv, "--chat", "Whale?", "--system", "You are Ishmael.")
    assert told.code == 0, told.err


def test_a_conversation_of_one_question_a_line(chatty, monkeypatch):
    argv = ("generate", chatty, "--temperature", "0", "--max-tokens", "4")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Whale?\n\nWho?\n"))
    done = slmjax(*argv, "--chat", "-")
    assert done.code == 0, done.err
    assert done.out.startswith(slmjax(*argv, "--chat", "Whale?").out)
    assert len(done.out) > len(slmjax(*argv, "--chat", "Whale?").out)


def test_mistakes_are_one_line(tiny_run, file, chatty, tmp_path):
    (tmp_path / "text.gguf").write_text("years of work, but no model at all")
    for argv, code, message in (
        (("generate", tiny_run, "--chat", "x"), 4, "the tokenizer has no chat template; use --prompt"),
        (("generate", chatty, "--chat", "x", "--prompt", "y"), 2, "--chat and --prompt exclude each other"),
        (("generate", chatty, "--system", "x", "--prompt", "y"), 2, "--system is for --chat"),
        (("generate", chatty, "--chat", "x" * 200), 2, "the model's context is 64"),
        (("generate", file, "--prompt", "x", "--step", "3"), 2, "is a GGUF file, without checkpoints"),
        (("generate", tmp_path / "none.gguf", "--prompt", "x"), 5, "none.gguf is missing"),
        (("import", tmp_path / "text.gguf", "--out", tmp_path / "a"), 5, "it begins with b'year'"),
        (("import", file, "--out", chatty), 2, "is not empty"),
        (("export", tiny_run, "--out", tmp_path / "a", "--dtype", "q8_0"), 2, "--dtype q8_0 is for --format gguf"),
        (("export", tiny_run, "--format", "gguf", "--out", file), 2, "already exists"),
        (("export", tiny_run, "--format", "gguf", "--out", tmp_path), 2, "is a folder; expected the name of a file"),
    ):
        done = slmjax(*argv)
        assert (done.code, done.err.count("\n")) == (code, 1), (argv, done.err)
        assert message in done.err
    assert not (tmp_path / "a").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("verb", "example"),
    [
        ("export", "--format gguf --out exports/quickstart.gguf"),
        ("import", "slmjax import SmolLM2"),
        ("generate", "--chat"),
    ],
)
def test_help_shows_examples(verb, example):
    done = slmjax(verb, "--help")
    assert done.code == 0
    assert example in done.out
