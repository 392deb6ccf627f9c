"""What a folder says of generated text, read, used and written back, against stock transformers."""

import json

import numpy as np
import pytest
from running import slmjax

from slmjax.convert import gate
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.data.generation_config import FILE, GenerationConfig, read
from slmjax.data.tokenizer import Bytes
from slmjax.errors import UserError
from slmjax.evals.generate import Generator
from slmjax.runs.loading import load

CONFIG = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
PROMPT = list(b"Call me Ishmael")
SAID = {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "do_sample": True, "pad_token_id": 3, "renormalize_logits": True}


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The gate runs stock transformers only where a test says so."""
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def free(reference, tmp_path_factory):
    """A model of stock transformers that names no end, and its greedy tokens; a tokenizer lies beside it."""
    folder = tmp_path_factory.mktemp("free") / "hf"
    reference.make(folder, CONFIG, seed=3)
    (folder / FILE).unlink(missing_ok=True)
    Bytes().make([], folder).save(folder)
    return folder, reference.continuation(folder, PROMPT, 24)["tokens"]


def ending(free, folder, ends, where, said=()):
    """A copy of the model whose `where` names these end tokens."""
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((free[0] / name).read_bytes())
    file = folder / where
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | dict(said) | {"eos_token_id": ends}))
    return folder


def second(tokens):
    """[a token that never comes, one that comes after a few others], as an end."""
    never = next(i for i in range(258) if i not in tokens)
    return [never, next(t for at, t in enumerate(tokens) if at >= 4 and t not in tokens[:at])]


@pytest.mark.parametrize("where", ["config.json", FILE])
def test_end_tokens_are_a_set(reference, free, tmp_path, where):
    """In the folder, after import, and after the export of the import; with and without a tokenizer."""
    ends = second(free[1])
    folder = ending(free, tmp_path / "hf", ends, where, SAID if where == FILE else {})
    wanted = reference.continuation(folder, PROMPT, 24)
    assert wanted["tokens"] == free[1][: free[1].index(ends[1]) + 1]
    assert len(wanted["tokens"]) < 24

    done = slmjax("import", folder, "--out", tmp_path / "imported")
    assert done.code == 0, done.err
    for model in (folder, tmp_path / "imported"):
        loaded = load(model)
        assert loaded.generation.ends == tuple(ends)
        generator = Generator(loaded.decoder, loaded.weights, loaded.tokenizer(), ends=loaded.generation.ends)
        (made,) = generator([PROMPT], max_tokens=24)
        assert list(made.tokens) == wanted["tokens"]
        assert made.reason == "eos"
    if where == FILE:  # the command puts the tokenizer's BOS first
        (made,) = generator([[256, *PROMPT]], max_tokens=24)
        text = slmjax(
            "generate", folder, "--prompt", bytes(PROMPT).decode(), "--temperature", "0", "--max-tokens", "24"
        )
        assert text.code == 0, text.err
        assert f"ended by {made.reason}" in text.err
        assert f"{len(made.tokens)} tokens" in text.err

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for i, model in enumerate((tmp_path / "imported", folder)):
        done = slmjax("export", model, "--out", tmp_path / f"out{i}")
        assert done.code == 0, done.err
        again = reference.continuation(tmp_path / f"out{i}", PROMPT, 24)
        assert again["tokens"] == wanted["tokens"]
        written = json.loads((tmp_path / f"out{i}" / "config.json").read_text())["eos_token_id"]
        assert written == ends if where == "config.json" else [written, again["said"]["eos_token_id"]] == [ends, ends]
        if where == FILE:
            assert {name: again["said"][name] for name in SAID} == SAID


def test_what_a_folder_says_is_the_default(free, tmp_path):
    """Sampling, lengths and stop strings: `generate` without options is `generate` with the options of the folder."""
    said = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.3, "max_length": 40}
    folder = ending(free, tmp_path / "hf", 257, FILE, said)
    argv = ("generate", folder, "--prompt", "Call me", "--seed", "4")
    options = ("--temperature", "0.5", "--top-p", "0.8", "--top-k", "50", "--repetition-penalty", "1.3")
    default = slmjax(*argv)
    assert default.code == 0, default.err
    assert default.out == slmjax(*argv, *options, "--max-tokens", str(40 - 8)).out  # BOS and seven letters
    (folder / FILE).write_text(json.dumps({"do_sample": False, "max_new_tokens": 5, "num_beams": 4}))
    greedy = slmjax(*argv)
    assert "asks for num_beams = 4, which slmjax does not do" in greedy.err
    assert greedy.out == slmjax(*argv, "--temperature", "0", "--max-tokens", "5").out


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("eos_token_id", [1, "x"], "a token id, or a list"), ("pad_token_id", [0, 1], "a token id"),
     ("top_p", 2.0, "in (0, 1]"), ("top_k", True, "a number of tokens"), ("max_length", 0, "a number of tokens"),
     ("stop_strings", ["."  , ""], "not empty")],
)  # fmt: skip
def test_mistakes_name_file_field_and_value(tmp_path, name, value, expected):
    (tmp_path / FILE).write_text(json.dumps({name: value}))
    with pytest.raises(UserError) as caught:
        read(tmp_path, {})
    assert all(part in str(caught.value) for part in (FILE, name, repr(value), expected))


def test_sampling_of_transformers_where_a_file_leaves_something_out():
    assert GenerationConfig(said={"do_sample": True}).sampling(default=0.8)["top_k"] == 50
    assert GenerationConfig(said={"do_sample": True}).sampling(default=0.8, top_k=0)["top_k"] is None
    assert GenerationConfig(said={"top_p": 0.5}).sampling(default=0.8, temperature=0.0)["temperature"] == 0.0
    assert GenerationConfig().sampling(default=0.8)["temperature"] == 0.8


def test_a_gguf_file_holds_the_ends_of_text_turn_and_message(free, tmp_path):
    loaded = load(free[0])
    write_gguf(tmp_path / "m.gguf", loaded.decoder, loaded.params, tokenizer=loaded.tokenizer(), ends=(257, 15, 9))
    imported = import_gguf(tmp_path / "m.gguf")
    assert imported.generation.ends == (257, 15, 9)
    assert np.array_equal([load(tmp_path / "m.gguf").generation.ends], [(257, 15, 9)])
