"""`slmjax import` of folders that nobody should have written: one line that names what is wrong, nothing left behind,
no memory taken. What a single file may hold is in test_safetensors_io.py; here it is the command and the folder."""

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from models.tiny import parameters
from running import slmjax

from slmjax.convert.hf import import_hf, write_hf
from slmjax.convert.safetensors_io import INDEX, SINGLE, Tensors, write
from slmjax.errors import StorageError
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.lfm2 import lfm2
from slmjax.models.families.llama import llama

DECODER = llama(layers=2, width=16, heads=2, kv_heads=1, hidden=24, vocab=31, context=32)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_hf(folder, DECODER, parameters(DECODER, DECODER.build()))
    return folder


def rewritten(change):
    """The folder with its tensors, by key, changed in place."""

    def apply(folder):
        tensors = dict(Tensors(folder))
        change(tensors)
        write(folder, tensors.items(), dtype="float32")

    return apply


def with_header(change):
    """The header changed, the data as they are."""

    def apply(folder):
        data = (folder / SINGLE).read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + n])
        change(header)
        text = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])

    return apply


def with_config(**fields):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return apply


def config_text(change):
    return lambda folder: (folder / "config.json").write_text(change((folder / "config.json").read_text()))


def raw(change):
    """The bytes of model.safetensors changed."""
    return lambda folder: (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))


def twice(data):
    """The header with one of its entries repeated, word for word."""
    (n,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + n].rstrip()
    again = json.dumps({Q: json.loads(text)[Q]}).encode()
    text = text[:-1] + b"," + again[1:]
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def index(weight_map):
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def tokenizer(model):
    """A tokenizer.json with this model."""
    return lambda folder: (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))


def pickled(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


CASES = {
    "wrong shape": (rewritten(lambda t: t.update({Q: t[Q][:, :-1]})), [Q, "[16, 15]", "[16, 16]"]),
    "transposed": (rewritten(lambda t: t.update({f: t[f].T for f in ["model.embed_tokens.weight"]})), ["[16, 31]"]),
    "missing tensor": (rewritten(lambda t: t.pop(Q)), [Q, "missing"]),
    "two missing": (rewritten(lambda t: [t.pop(Q), t.pop("model.norm.weight")]), ["missing and 1 more"]),
    "extra tensor": (rewritten(lambda t: t.update(backdoor=np.ones(3, np.float32))), ["'backdoor'", "no place"]),
    "a layer too many": (
        rewritten(lambda t: t.update({Q.replace("1", "2"): t[Q]})), ["model.layers.2", "no place"]),
    "a layer too few": (with_config(num_hidden_layers=1), ["model.layers.1", "no place"]),
    "output table unlike the tied one": (
        rewritten(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        ["lm_head", "tied", "tie_word_embeddings"]),
    "not finite": (raw(lambda b: b[:-4] + struct.pack("<f", float("nan"))), ["NaN or Inf"]),
    "integers": (with_header(lambda h: h[Q].update(dtype="I32")), [Q, "int32", "expected float32"]),
    "dtype unknown to the format": (with_header(lambda h: h[Q].update(dtype="F31")), [SINGLE, "F31"]),
    "dtype of another width": (with_header(lambda h: h[Q].update(dtype="F64")), [SINGLE]),
    "truncated": (raw(lambda b: b[:-7]), [SINGLE]),
    "header only": (raw(lambda b: b[:64]), [SINGLE]),
    "empty": (raw(lambda b: b""), [SINGLE]),
    "header of a terabyte": (raw(lambda b: struct.pack("<Q", 2**40) + b[8:]), [SINGLE]),
    "tensor of a terabyte": (
        with_header(lambda h: h[Q].update(shape=[2**20, 2**20], data_offsets=[0, 2**42])), [SINGLE]),
    "overlap": (
        with_header(lambda h: h[Q].update(data_offsets=[x - 4 for x in h[Q]["data_offsets"]])), [SINGLE]),
    "out of range": (with_header(lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 1024])), [SINGLE]),
    "key twice in the header": (raw(twice), [SINGLE, Q, "twice"]),
    "two keys for the same bytes": (
        raw(lambda b: b.replace(b"model.layers.0.mlp.up_proj.weight", b"model.layers.1.mlp.up_proj.weight")),
        [SINGLE, "model.layers.1.mlp.up_proj.weight"]),
    "pickle under a safe name": (raw(lambda b: b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."), [SINGLE]),
    "pickle": (pickled, ["pytorch_model.bin", "pickle"]),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), [SINGLE, INDEX]),
    "index out of the folder": (index({Q: "../../secret.safetensors"}), [INDEX, "../../secret.safetensors"]),
    "index with a whole path": (index({Q: "/etc/passwd.safetensors"}), [INDEX, "/etc/passwd"]),
    "index names a tensor that is not there": (index({Q: SINGLE, "ghost": SINGLE}), ["index"]),
    "index repeats a key": (
        lambda folder: (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{SINGLE}", "a": "b.safetensors"}}}}'),
        [INDEX, "'a'", "twice"]),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), [INDEX]),
    "config is no JSON": (config_text(lambda s: s[:-5]), ["config.json", "not valid JSON"]),
    "config is a list": (config_text(lambda s: "[]"), ["config.json", "list"]),
    "config nested without end": (config_text(lambda s: "[" * 10**6), ["config.json", "not valid JSON"]),
    "config with a key twice": (
        config_text(lambda s: s.replace("{", '{"hidden_size": 32,', 1)), ["config.json", "'hidden_size'", "twice"]),
    "config with NaN": (with_config(rms_norm_eps=float("nan")), ["config.json", "NaN"]),
    "config of 20 MB": (with_config(padding="x" * 20_000_000), ["config.json", "more than any configuration"]),
    "contradictory theta": (with_config(rope_theta=5.0), ["config.json", "rope_theta = 5.0", "10000.0"]),
    "other heads": (with_config(num_attention_heads=4), ["q_proj", "[16, 16]", "[32, 16]"]),
    "no heads": (with_config(num_attention_heads=0), ["num_attention_heads = 0"]),
    "a string for a size": (with_config(hidden_size="16"), ["hidden_size", "'16'"]),
    "a list of models": (with_config(model_type=["llama"]), ["config.json", "['llama']"]),
    "a field that speaks to the terminal": (with_config(**{"a\nb\x1b[31m": 5}), ["config.json: a b?[31m = 5"]),
    "a value without end": (with_config(hidden_size="x" * 100_000), ["hidden_size", "xxx..."]),
    "unknown model": (with_config(model_type="evil"), ["config.json", "'evil'"]),
    "a billion layers": (with_config(num_hidden_layers=10**9), ["num_hidden_layers", "20 tensors"]),
    "a table of a petabyte": (with_config(vocab_size=10**13), ["vocab_size = 10000000000000"]),
    "a head of a petabyte": (with_config(head_dim=10**13), ["head_dim"]),
    "eps of nothing": (with_config(rms_norm_eps=-1.0), ["eps: -1.0"]),
    "theta of nothing": (
        with_config(rope_parameters={"rope_theta": 0.0, "rope_type": "default"}, rope_theta=0.0), ["theta: 0.0"]),
    "scaling by nothing": (
        with_config(rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": 0.0}), ["factor: 0.0"]),
    "llama3 scaling by nothing": (
        with_config(rope_parameters=None, rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32}),
        ["low = 1.0 is not below high = 1.0"]),
    "longrope of words": (
        with_config(rope_parameters=None, rope_scaling={
            "rope_type": "longrope", "factor": 8.0, "short_factor": ["x"], "long_factor": ["y"],
            "original_max_position_embeddings": 32}),
        ["short_factor = ['x'] is not a list of numbers"]),
    "an integer beyond all": (with_config(sliding_window=10**18), ["sliding_window = 1000000000000000000"]),
    "kinds of rope that are a list": (
        with_config(rope_parameters=None, rope_scaling={"rope_type": []}), ["config.json", "TypeError"]),
    "tokenizer without tokens": (
        tokenizer({"type": "BPE", "vocab": {}, "merges": []}), ["tokenizer.json", "has no tokens"]),
    "tokenizer of another model": (
        tokenizer({"type": "BPE", "vocab": {"a": 0, "b": 31}, "merges": []}), ["ids up to 31", "31 rows"]),
    "tokenizer with ids beyond all": (
        tokenizer({"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}), ["ids up to 4294967295"]),
    "chat template that is no text": (
        lambda folder: [
            tokenizer({"type": "BPE", "vocab": {"a": 0}, "merges": []})(folder),
            (folder / "chat_template.jinja").write_bytes(b"\xff"),
        ],
        ["chat_template.jinja", "cannot be read as text"]),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_folder_is_refused_in_one_line(good, tmp_path, name):
    spoil, words = CASES[name]
    folder = shutil.copytree(good, tmp_path / "theirs")
    before = (folder / "config.json").read_bytes(), (folder / SINGLE).read_bytes()
    spoil(folder)
    changed = not (folder / SINGLE).exists() or before != (
        (folder / "config.json").read_bytes(), (folder / SINGLE).read_bytes()
    )  # fmt: skip
    assert changed or len(list(folder.iterdir())) > len(list(good.iterdir())), "nothing was spoiled"
    done = slmjax("import", folder, "--out", tmp_path / "ours")
    assert done.code in (2, 4, 5), (done.code, done.err)
    assert done.err.startswith("slmjax: error: ")
    assert done.err.count("\n") == 1, done.err
    assert len(done.err) < 1000
    for word in words:
        assert word in done.err, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"], "something was left behind"


def test_the_same_folder_unspoiled_is_imported(good, tmp_path):
    done = slmjax("import", good, "--out", tmp_path / "ours")
    assert done.code == 0, done.err
    assert (tmp_path / "ours" / "config.json").is_file()


def test_a_context_without_end_takes_no_memory(tmp_path):
    """Learned positions are a table as long as the context says."""
    decoder = gpt2(layers=1, width=16, heads=2, vocab=31, context=16)
    write_hf(tmp_path, decoder, parameters(decoder, decoder.build()))
    for length, words in ((10**9, ["wpe", "[16, 16]", "[1000000000, 16]"]), (10**13, ["n_positions = 10000000000000"])):
        with_config(n_positions=length)(tmp_path)
        done = slmjax("import", tmp_path, "--out", tmp_path / "ours")
        assert done.code == 5, done.err
        assert all(word in done.err for word in words), done.err


def test_taps_without_end_take_no_time(tmp_path):
    """Each tap of a short convolution is a piece of the program."""
    decoder = lfm2(attends=[False, True], width=16, heads=2, kv_heads=1, hidden=24, vocab=31, context=32)
    write_hf(tmp_path, decoder, parameters(decoder, decoder.build()))
    with_config(conv_L_cache=10**9)(tmp_path)
    with pytest.raises(StorageError, match="conv_L_cache = 1000000000 is impossible"):
        import_hf(tmp_path)


MEASURE = """
import pathlib, resource, sys
from slmjax.convert.hf import import_hf
from slmjax.errors import UserError

good, *folders = map(pathlib.Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
import_hf(good)
before = peak()
for folder in folders:
    try:
        import_hf(folder)
    except UserError:
        pass
    else:
        sys.exit(f"{folder} was accepted")
    print(folder.name, peak() - before)
"""
GREEDY = [
    "header of a terabyte", "tensor of a terabyte", "out of range", "config nested without end", "a billion layers",
    "a table of a petabyte", "a head of a petabyte", "other heads",
]  # fmt: skip


def test_refusals_take_no_memory(good, tmp_path):
    """Peak resident memory of a process that reads them all, beyond what reading the good folder took."""
    for name in GREEDY:
        CASES[name][0](shutil.copytree(good, tmp_path / name))
    folders = [str(tmp_path / name) for name in GREEDY]
    done = subprocess.run([sys.executable, "-c", MEASURE, str(good), *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert list(grown) == GREEDY
    assert max(map(int, grown.values())) < 50e6, grown


def test_a_file_that_shrinks_while_it_is_read_is_refused(good, tmp_path):
    """A mapped file would kill the process here."""
    folder = shutil.copytree(good, tmp_path / "theirs")
    tensors = Tensors(folder)
    last = max(tensors.described, key=lambda key: tensors.described[key].start)
    with (folder / SINGLE).open("r+b") as file:
        file.truncate(tensors.described[last].start + 3)
    with pytest.raises(StorageError, match=f"'{last}' cannot be read"):
        tensors[last]
    assert import_hf(good).decoder == DECODER
