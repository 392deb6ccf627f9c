"""The export as a whole: the gate, the folder that appears complete or not at all, the tokenizer, shards, mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
from contract.shapes import perturbed

from slmjax.convert import export, gate
from slmjax.convert.card import Facts
from slmjax.convert.export import export_hf
from slmjax.convert.folder import MARK, Rejected, publish
from slmjax.convert.hf import import_hf, write_hf
from slmjax.convert.safetensors_io import INDEX, Tensors
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.tree import flatten

LLAMA = llama(layers=3, width=32, heads=4, kv_heads=2, hidden=48, vocab=300, context=64)
GPT2 = gpt2(layers=2, width=32, heads=4, vocab=300, context=64)


@pytest.fixture(scope="module")
def params():
    return perturbed(LLAMA)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The gate runs stock transformers only where a test says so."""
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


def tokenizer():
    return Bytes().make([], pathlib.Path())


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("decoder", "dtype"), [(LLAMA, "float32"), (GPT2, "bfloat16")], ids=["llama", "gpt2"])
def test_export_passes_the_gate_with_stock_transformers(tmp_path, reference, decoder, dtype):
    out = tmp_path / "hf"
    made = export_hf(
        decoder,
        perturbed(decoder),
        out,
        dtype=dtype,
        tokenizer=tokenizer(),
        facts=Facts(name="Small", steps=12),
        reference_python=reference.python,
        shard_bytes=40_000,
    )
    assert [check.passed for check in made.checks] == [True] * 7
    record = json.loads((out / MARK).read_text())
    assert [check["name"] for check in record["checks"]] == [check.name for check in made.checks]
    assert all(check["passed"] for check in record["checks"])
    assert (out / INDEX).is_file(), "a small limit makes shards, which stock transformers just loaded"
    assert names(tmp_path) == ["hf"]
    assert set(names(out)) >= {
        "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", MARK, INDEX,
    }  # fmt: skip
    assert {x.dtype.name for x in Tensors(out).values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert "- Steps: 12" in (out / "README.md").read_text()


def test_without_torch_the_gate_says_that_it_could_not_ask_transformers(tmp_path, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    made = export_hf(LLAMA, params, tmp_path / "hf")
    assert [check.passed for check in made.checks] == [True, True, None]
    assert "--reference-python" in made.checks[-1].found


def test_sharded_round_trip_is_bit_exact(tmp_path, params):
    write_hf(tmp_path, LLAMA, params, shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    back = flatten(import_hf(tmp_path).params)
    for path, x in flatten(params).items():
        assert back[path].tobytes() == np.asarray(x).tobytes(), path


def test_a_bfloat16_export_is_compared_with_the_rounded_parameters(tmp_path, params):
    made = export_hf(LLAMA, params, tmp_path / "hf", dtype="bfloat16")
    same, logits, _ = made.checks
    assert same.found == "all 11 identical"
    assert logits.passed
    rounded = import_hf(tmp_path / "hf").params
    assert any(
        not np.array_equal(x, np.asarray(y))
        for x, y in zip(jax.tree.leaves(rounded), jax.tree.leaves(params), strict=True)
    )


DRIFTS = [
    ("embed/table", None, "embedding"),
    ("layers/mlp/up", 1, "block 1"),
    ("layers/attn/o", 0, "block 0"),
    ("final_norm/scale", None, "block 2 or the final norm"),
]


@pytest.mark.parametrize(("path", "layer", "place"), DRIFTS)
def test_a_wrong_parameter_is_caught_and_the_drifting_block_named(tmp_path, params, monkeypatch, path, layer, place):
    """What an error in a table would do: the file holds something else than the model."""
    faithful = export.write_hf

    def unfaithful(folder, decoder, params, **options):
        wrong = jax.tree.map(np.array, params)
        leaf = wrong
        for key in path.split("/"):
            leaf = leaf[key]
        leaf[... if layer is None else layer] *= 1.01
        faithful(folder, decoder, wrong, **options)

    monkeypatch.setattr(export, "write_hf", unfaithful)
    out = tmp_path / "hf"
    with pytest.raises(Rejected, match=rf"reload: parameters .*1 differ, first {path}.*hf\.failed") as error:
        export_hf(LLAMA, params, out)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["hf.failed"], "nothing under the good name"
    record = json.loads((tmp_path / "hf.failed" / MARK).read_text())
    parameters, logits, _ = record["checks"]
    assert (parameters["passed"], logits["passed"]) == (False, False)
    assert f"drifts first in the {place} (" in logits["found"]
    with pytest.raises(Rejected, match=r"hf\.2\.failed"):
        export_hf(LLAMA, params, out)


def test_stock_transformers_that_disagrees_fails_the_gate(tmp_path, reference, params, monkeypatch):
    """A configuration that says something else than the model computes: only transformers can notice."""
    faithful = export.write_hf

    def unfaithful(folder, decoder, params, **options):
        faithful(folder, decoder, params, **options)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 5e4
        (folder / "config.json").write_text(json.dumps(config))

    original = export.import_hf
    monkeypatch.setattr(export, "write_hf", unfaithful)
    monkeypatch.setattr(
        export, "import_hf", lambda folder: type(x := original(folder))(**{**x.__dict__, "decoder": LLAMA})
    )
    with pytest.raises(Rejected, match=r"transformers [\d.]+: logits: max\|Δ\| .*drifts first in the block 0"):
        export_hf(LLAMA, params, tmp_path / "hf", reference_python=reference.python)


def test_a_reference_python_without_torch_is_a_mistake_of_the_user(tmp_path, params):
    with pytest.raises(UserError, match="it needs torch and transformers"):
        export_hf(LLAMA, params, tmp_path / "hf", reference_python=sys.executable)
    with pytest.raises(UserError, match="cannot be run"):
        export_hf(LLAMA, params, tmp_path / "hf", reference_python="/nowhere/python")
    assert names(tmp_path) == []


def test_a_model_with_nan_is_not_exported(tmp_path, params):
    broken = jax.tree.map(np.array, params)
    broken["layers"]["mlp"]["down"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN"):
        export_hf(LLAMA, broken, tmp_path / "hf")
    assert names(tmp_path) == []


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    small = llama(layers=1, width=32, heads=4, kv_heads=2, hidden=48, vocab=100, context=64)
    with pytest.raises(UserError, match="the tokenizer has 258 ids but the model only 100"):
        export_hf(small, perturbed(small), tmp_path / "hf", tokenizer=tokenizer())


def with_bos(raw, **special):
    return Tokenizer(raw, **{"bos": None, "eos": None, **special})


def words():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "quick": 4, "a": 5}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.add_special_tokens(["<s>", "</s>"])
    return raw


def adds_both(raw):
    """Post-processing that documents in training did not get."""
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return raw


TOKENIZERS = {
    "bytes": lambda: Bytes().make([], pathlib.Path()),
    "no post-processing, BOS in training": lambda: with_bos(words(), bos="<s>", eos="</s>"),
    "post-processing adds EOS, training BOS": lambda: with_bos(adds_both(words()), bos="<s>", eos="</s>"),
    "post-processing adds both, training neither": lambda: with_bos(adds_both(words())),
    "only EOS": lambda: with_bos(words(), eos="</s>"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_auto_tokenizer_encodes_as_training_did(tmp_path, reference, params, name):
    made = TOKENIZERS[name]()
    write_hf(tmp_path, LLAMA, params, tokenizer=made)
    texts = ["the quick a", "a", "  the\n\nquick!", "naïve 🙂 <|eos|>"[:9]]
    theirs = reference.tokenize(tmp_path, texts)
    assert theirs["ids"] == [made.encode(text, bos=True) for text in texts]
    assert (theirs["bos"], theirs["eos"]) == (made.bos_id, made.eos_id)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (made.bos_id, made.eos_id)
    again = Tokenizer.load(tmp_path)
    assert again.encode(texts[0], bos=True) == made.encode(texts[0], bos=True)
    if name == "bytes":
        assert theirs["decoded"] == texts


def test_a_folder_that_holds_something_is_left_alone(tmp_path, params):
    out = tmp_path / "hf"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty; choose another folder or add --overwrite"):
        export_hf(LLAMA, params, out)
    with pytest.raises(UserError, match=r"not written by an export.*so it is not replaced"):
        export_hf(LLAMA, params, out, overwrite=True)
    assert names(out) == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_hf(LLAMA, params, tmp_path / "file")
    assert names(tmp_path) == ["file", "hf"]


def test_an_earlier_export_is_replaced_only_when_asked_and_whole(tmp_path, params, monkeypatch):
    out = tmp_path / "hf"
    out.mkdir()  # an empty folder may be used
    export_hf(LLAMA, params, out)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        export_hf(LLAMA, params, out)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "render", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
        export_hf(LLAMA, params, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == first
    monkeypatch.undo()
    export_hf(LLAMA, perturbed(LLAMA, seed=1), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert names(tmp_path) == ["hf"]


WRITES_FOREVER = """
import pathlib, sys, time
from slmjax.convert.folder import publish
with publish(pathlib.Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "half").write_text("written")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "an export there"])
def test_sigkill_while_writing_leaves_nothing_under_the_name(tmp_path, there):
    out = tmp_path / "hf"
    if there:
        out.mkdir()
        (out / MARK).write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOREVER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert out.exists() == there
    if there:
        assert names(out) == [MARK]
    assert len(list(tmp_path.glob(".hf.partial-*"))) == 1
    with publish(out, overwrite=True) as folder:
        (folder / MARK).write_text("[]")
        assert len(list(tmp_path.glob(".hf.partial-*"))) == 1, "what the dead process left is gone"
    assert (out / MARK).read_text() == "[]"
    assert names(tmp_path) == ["hf"]


def test_sigkill_at_random_moments_of_a_real_export(tmp_path, params):
    """Whenever it is killed, the name is either free or a folder that loads bit-exactly."""
    program = (
        "import pathlib, sys; from contract.shapes import perturbed; from convert.test_export import LLAMA;"
        "from slmjax.convert.folder import publish; from slmjax.convert.hf import write_hf\n"
        "params = perturbed(LLAMA); print('ready', flush=True)\n"
        "for i in range(10**6):\n"
        "  with publish(pathlib.Path(sys.argv[1], str(i)), overwrite=False) as folder:\n"
        "    write_hf(folder, LLAMA, params, shard_bytes=10_000)\n"
        "  print(i, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["ready\n", "0\n", "1\n"]
        time.sleep(np.random.default_rng().random())
        process.send_signal(signal.SIGKILL)
    finished = [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert finished
    last = max(finished, key=lambda p: int(p.name))
    for folder in {finished[0], last}:
        back = flatten(import_hf(folder).params)
        assert all(back[path].tobytes() == np.asarray(x).tobytes() for path, x in flatten(params).items())
