"""Each mistake ends in one line on stderr that names the field or file, with its exit code, and nothing is lost."""

import json
import shutil

import pytest
from running import runtime, slmjax, store_of


def one_line(done, code, *words):
    assert done.code == code, (done.code, done.err)
    last = done.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("slmjax: error: "), done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in last, last


def tree(folder):
    return {p.relative_to(folder): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.bach", "4"], ["--data.bach", "--data.batch"]),
        (["--model.pattern.0.mixer.head", "4"], ["--model.pattern.0.mixer.heads"]),
        (["--steps", "many"], ["steps", "many", "a whole number"]),
        (["--steps", "0"], ["steps is 0", "at least 1"]),
        (["--evaluation.batches", "0"], ["evaluation.batches is 0", "at least 1"]),
        (["--runtime.log-every", "0"], ["runtime.log_every is 0", "at least 1"]),
        (["--runtime.samples.every", "-1"], ["runtime.samples.every is -1", "at least 0"]),
        (["--schedule.warmup-steps", "99"], ["warmup_steps", "99", "12"]),
        (["--data.length", "128"], ["data.length is 128", "model.context 64"]),
        (["--model.vocab", "100"], ["model.vocab is 100", "384"]),
        (["--accumulate", "3"], ["accumulate is 3", "data.batch 8"]),
        (["--optimizer.weight-decay", "-1"], ["weight_decay is -1"]),
        (["--runtime.mesh.tensor", "3"], ["tensor=3", "8 device"]),
    ],
    ids=lambda x: x[0] if x and x[0].startswith("--") else "",
)
def test_a_bad_field(tiny, tmp_path, arguments, words):
    done = slmjax("train", tiny.file, *runtime(tiny, tmp_path / "run"), *arguments)
    one_line(done, 2, *words)
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus(tiny, tmp_path):
    file = tmp_path / "missing_corpus.py"
    file.write_text(tiny.file.read_text().replace("moby.jsonl", "nowhere.jsonl"))
    one_line(slmjax("train", file, *runtime(tiny, tmp_path / "run")), 4, "nowhere.jsonl")
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus(tiny, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    file = tmp_path / "empty_corpus.py"
    file.write_text(tiny.file.read_text().replace(str(tiny.text), str(tmp_path / "empty.jsonl")))
    one_line(slmjax("train", file, *runtime(tiny, tmp_path / "run")), 4, "moby", "no document")


def test_a_malformed_line_names_file_and_line(tiny, tmp_path):
    lines = tiny.text.read_text().split("\n")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:3], '{"text": oops', *lines[3:]]))
    file = tmp_path / "malformed_corpus.py"
    file.write_text(tiny.file.read_text().replace(str(tiny.text), str(tmp_path / "bad.jsonl")))
    one_line(slmjax("train", file, *runtime(tiny, tmp_path / "run")), 4, "bad.jsonl", "4")


def test_a_corrupt_shard_is_named(tiny, tiny_run, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(store_of(tiny), store)
    shard = max((store / "train" / "tokens").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    shard.write_bytes(raw)
    file = tmp_path / "corrupt_shard.py"
    file.write_text(tiny.file.read_text().replace("source=RECIPE", f'source="{store}"'))
    done = slmjax("train", file, *runtime(tiny, tmp_path / "run"))
    one_line(done, 4, shard.name)


def test_a_tokenizer_that_does_not_match_the_store(tiny, tiny_run, tmp_path):
    recipe = tmp_path / "other_tokenizer.py"
    other = tiny.file.read_text().replace("vocab=384", "vocab=300")
    recipe.write_text(f"{other}\n\ndef recipe():\n    return RECIPE\n")
    built = slmjax("data", "build", recipe, "--out", tmp_path / "store")
    assert built.code == 0, built.err
    one_line(slmjax("eval", tiny_run, "--data", tmp_path / "store"), 4, "tokenizer")


def test_a_workdir_of_something_else(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    one_line(slmjax("train", tiny.file, *runtime(tiny, tmp_path)), 2, str(tmp_path), "not a run folder")
    assert tree(tmp_path).keys() == {(tmp_path / "thesis.tex").relative_to(tmp_path)}


def test_two_runs_on_one_folder(tiny, tiny_run, tmp_path):
    from slmjax.train.lock import lock

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / "12")
    with lock(run):
        done = slmjax("train", tiny.file, *runtime(tiny, run))
    one_line(done, 2, str(run), "at work here")
    assert slmjax("train", tiny.file, *runtime(tiny, run)).code == 0


def test_no_checkpoint_at_all(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints")
    done = slmjax("generate", run, "--prompt", "x")
    assert done.code in (2, 5)
    one_line(done, done.code, "checkpoint")


def test_export_into_a_folder_that_is_not_empty(tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    one_line(slmjax("export", tiny_run, "--format", "hf", "--out", tmp_path), 2, str(tmp_path), "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_safetensors_with_a_hostile_header(tiny_run, tmp_path):
    out = tmp_path / "hf"
    exported = slmjax("export", tiny_run, "--format", "hf", "--out", out)
    assert exported.code == 0, exported.err
    weights = out / "model.safetensors"
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    first, second = [k for k in header if k != "__metadata__"][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    patched = json.dumps(header).encode()
    weights.write_bytes(len(patched).to_bytes(8, "little") + patched + raw[8 + size :])
    done = slmjax("eval", out, "--data", tmp_path)
    assert done.code in (2, 5)
    one_line(done, done.code, "model.safetensors")


def test_a_config_that_names_foreign_code(tiny_run, tmp_path):
    config = json.loads((tiny_run / "config.json").read_text())
    config["experiment"]["view"] = {"$type": "antigravity:View"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one_line(slmjax("train", tmp_path / "config.json"), 2, "antigravity:View", "--code")
