"""GGUF files: what is refused, what comes back, what the gate catches."""

import json
import os
import pathlib
import struct
import sys

import gguf
import jax
import numpy as np
import pytest
from contract.gguf_models import patched
from contract.shapes import perturbed

from slmjax import tree
from slmjax.convert import gate
from slmjax.convert.card import Facts
from slmjax.convert.folder import Rejected
from slmjax.convert.gguf import export as gguf_export
from slmjax.convert.gguf.export import export_gguf
from slmjax.convert.gguf.file import GGUF, READABLE
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.convert.tokenizer_files import PROBES
from slmjax.data.chat import ChatTemplate
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.nn.mlp import gelu
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import LinearScaling, Llama3Scaling

SMALL = {"layers": 2, "width": 64, "vocab": 270, "hidden": 96, "context": 128}
LLAMA = llama(**SMALL, heads=4, kv_heads=2)
DECODERS = {
    "grouped-query": LLAMA,
    "untied, biases, free head_dim": llama(
        **SMALL, heads=2, kv_heads=1, head_dim=40, tied=False, attention_bias=True, mlp_bias=True, eps=1e-6, theta=5e5
    ),
    "linear scaling": llama(**SMALL, heads=2, kv_heads=2, scaling=LinearScaling(factor=4.0)),
    "llama3 scaling": llama(**SMALL, heads=2, kv_heads=2, scaling=Llama3Scaling(factor=8.0, original_context=8192)),
}


def tokenizer(chat=None):
    made = Bytes().make([], pathlib.Path())
    return Tokenizer(made.raw, bos=made.bos, eos=made.eos, chat=chat and ChatTemplate(source=chat))


@pytest.fixture(autouse=True)
def without_reference(monkeypatch):
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small llama."""
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(out, LLAMA, perturbed(LLAMA), tokenizer=tokenizer("{{ messages[0].content }}"))
    return out


def same(a, b):
    for path, x in tree.flatten(a).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(tree.flatten(b)[path]), err_msg=path)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_written_comes_back_bit_for_bit(tmp_path, name):
    decoder = DECODERS[name]
    params = perturbed(decoder)
    write_gguf(tmp_path / "a.gguf", decoder, params, tokenizer=tokenizer())
    back = import_gguf(tmp_path / "a.gguf")
    assert back.decoder == decoder
    same(back.params, params)
    assert back.tokenizer.vocab == tokenizer().vocab, "rows without a token are none of the tokenizer's"
    for text in PROBES:
        assert back.tokenizer.encode(text, bos=True, eos=True) == tokenizer().encode(text, bos=True, eos=True)


def test_the_library_reads_the_same(file):
    """Our reader against the one of the gguf package."""
    theirs, ours = gguf.GGUFReader(file), GGUF(file)
    assert [t.name for t in theirs.tensors] == list(ours)
    for t in theirs.tensors:
        np.testing.assert_array_equal(gguf.dequantize(t.data, t.tensor_type), ours[t.name].reshape(t.data.shape))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            found = ours.metadata[key]
            assert (list(found) if isinstance(found, (list, np.ndarray)) else found) == field.contents(), key


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind not in ("Q1_0", "Q2_0")])
def test_every_format_is_unpacked_as_the_library_does(tmp_path, kind):
    """Random bytes: as packed values they are as good as any, but for scales that are not finite."""
    number = gguf.GGMLQuantizationType[kind]
    block, packed = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (7, 2 * packed), dtype=np.uint8)
    if kind == "F32":
        raw = rng.normal(size=(7, 2)).astype(np.float32).view(np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, number)
    raw, expected = raw[np.isfinite(expected).all(axis=1)], expected[np.isfinite(expected).all(axis=1)]
    assert len(raw) > 1
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = GGUF(tmp_path / "a.gguf")["x"]
    assert found.shape == (len(raw), 2 * block)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 1e-2)])
def test_rounded_weights_come_back_near(tmp_path, dtype, limit):
    params = perturbed(LLAMA)
    export_gguf(LLAMA, params, tmp_path / "a.gguf", tokenizer=tokenizer(), dtype=dtype)
    back = tree.flatten(import_gguf(tmp_path / "a.gguf").params)
    for path, x in tree.flatten(params).items():
        x = np.asarray(x)
        error = np.abs(back[path] - x).max()
        assert error <= limit * np.abs(x).max()
        assert (error == 0) == ("norm" in path), f"{path}: norms stay float32, matrices are rounded"


SCALINGS = [
    Llama3Scaling(factor=32.0),
    Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_context=8192),
    Llama3Scaling(factor=4.0, low=2.0, high=5.0, original_context=1024),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path, scaling):
    decoder = llama(**SMALL, heads=1, kv_heads=1, theta=5e5, scaling=scaling)
    write_gguf(tmp_path / "a.gguf", decoder, perturbed(decoder), tokenizer=tokenizer())
    found = import_gguf(tmp_path / "a.gguf").decoder.pattern[0].mixer.position
    np.testing.assert_allclose(found.frequencies(64), Rope(theta=5e5, scaling=scaling).frequencies(64), rtol=2e-6)
    if scaling.original_context == 8192:
        assert found.scaling == scaling


NOT_A_SCALING = np.linspace(1, 3, 8).astype(np.float32)
WRONG = {
    r"tensor 'blk\.1\.ffn_up\.weight' of shape \[96, 64\] is missing": {"blk.1.ffn_up.weight": None},
    r"tensor 'token_embd\.weight' is missing": {"token_embd.weight": None},
    r"tensor 'blk\.0\.attn_k\.weight' has shape \[64, 64\]; expected \[32, 64\]": {
        "blk.0.attn_k.weight": np.zeros((64, 64), np.float32)
    },
    r"tensor 'blk\.7\.ffn_up\.weight' has no place in this model": {
        "blk.7.ffn_up.weight": np.zeros((4, 4), np.float32)
    },
    "tensor 'output_norm.weight' holds NaN": {"output_norm.weight": np.full(64, np.nan, np.float32)},
    r"llama\.block_count = 1000000, but there are only": {"llama.block_count": 1_000_000},
    r"llama\.attention\.head_count = 0; expected a positive": {"llama.attention.head_count": 0},
    r"llama\.embedding_length = missing; expected a positive": {"llama.embedding_length": None},
    r"llama\.expert_count = 8 is not supported": {"llama.expert_count": 8},
    r"llama\.rope\.scaling\.type = 'longrope'": {"llama.rope.scaling.type": "longrope"},
    r"'rope_freqs\.weight' is not a llama3 scaling": {"rope_freqs.weight": NOT_A_SCALING},
    r"'rope_freqs\.weight' has shape \[9\]; expected \[8\]": {"rope_freqs.weight": np.ones(9, np.float32)},
    r"tokenizer\.ggml\.model = 'bert' is not supported": {"tokenizer.ggml.model": "bert"},
    r"tokenizer\.ggml\.pre = 'exotic': this rule for splitting": {"tokenizer.ggml.pre": "exotic"},
    r"tokenizer\.ggml\.eos_token_id is 999": {"tokenizer.ggml.eos_token_id": 999},
    r"tokenizer\.ggml\.token_type has 2 entries for 270": {"tokenizer.ggml.token_type": [1, 1]},
    r"tokenizer\.ggml\.tokens holds 'a' twice": {"tokenizer.ggml.tokens": ["a"] * 270},
    r"general\.alignment is 3": {"general.alignment": 3},
    "one of 3 parts": {"split.count": 3},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_contradicts_itself_is_refused_by_name(file, tmp_path, message):
    with pytest.raises((UserError, StorageError), match=message) as error:
        import_gguf(patched(file, tmp_path / "bad.gguf", **WRONG[message]))
    assert "\n" not in str(error.value)
    assert "bad.gguf" in str(error.value)


def text(x):
    return struct.pack("<Q", len(x)) + x


def header(tensors=0, pairs=0, rest=b"", version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def tensor(name=b"x", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


TERA = 1 << 40
STRING, ARRAY, U8, U32 = 8, 9, 0, 4
HOSTILE = {
    "not a GGUF file: it begins with b'GGML'": header(magic=b"GGML"),
    "not a GGUF file: it has 3 bytes": b"GGU",
    "GGUF version 1 is not supported; expected one of 2, 3": header(version=1),
    "big-endian, GGUF version 50331648": header(version=0x03000000),
    "the number of tensors is 1099511627776, more than": header(tensors=TERA),
    "the number of keys is 1099511627776, more than": header(pairs=TERA),
    "truncated: the name of key 0 needs 1099511627776 bytes": header(pairs=1, rest=struct.pack("<Q", TERA) + b"a" * 64),
    "truncated: the key 'a' needs 1099511627776 bytes": header(
        pairs=1, rest=text(b"a") + struct.pack("<IQ", STRING, TERA)
    ),
    "the length of the key 'a' is 1099511627776": header(
        pairs=1, rest=text(b"a") + struct.pack("<IIQ", ARRAY, U8, TERA)
    ),
    "the length of the key 'b' is 1099511627776": header(
        pairs=1, rest=text(b"b") + struct.pack("<IIQ", ARRAY, STRING, TERA)
    ),
    "the key 'a' has the unknown type 9": header(pairs=1, rest=text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 1)),
    "the key 'a' has the unknown type 77": header(pairs=1, rest=text(b"a") + struct.pack("<II", 77, 0)),
    "the key 'a' occurs twice": header(
        pairs=2, rest=(text(b"a") + struct.pack("<II", U32, 1)) * 2 + b"\0" * 32
    ),
    "the name of key 0 is not UTF-8": header(pairs=1, rest=text(b"\xff\xfe") + b"\0" * 32),
    "the tensor 'x' occurs twice": header(tensors=2, rest=tensor() * 2 + b"\0" * 512),
    "tensor 'x' has the unknown quantization 99; expected one": header(tensors=1, rest=tensor(kind=99) + b"\0" * 512),
    "tensor 'x' has the unknown quantization IQ2_XXS": header(tensors=1, rest=tensor(kind=16) + b"\0" * 512),
    "tensor 'x' has 5 axes": header(tensors=1, rest=tensor(dims=(1,) * 5) + b"\0" * 512),
    r"tensor 'x' of shape \[0\] is not a whole number": header(tensors=1, rest=tensor(dims=(0,)) + b"\0" * 512),
    r"tensor 'x' of shape \[33\] is not a whole number of Q8_0": header(
        tensors=1, rest=tensor(dims=(33,), kind=8) + b"\0" * 512
    ),
    r"truncated: tensor 'x' of shape \[4294967296, 4294967296\] takes": header(
        tensors=1, rest=tensor(dims=(1 << 32, 1 << 32)) + b"\0" * 512
    ),
    "tensor 'x' does not begin at a multiple of 32": header(tensors=1, rest=tensor(offset=1) + b"\0" * 512),
    "truncated: tensor 'x'": header(tensors=1, rest=tensor(offset=1 << 62) + b"\0" * 512),
    "the tensors 'x' and 'y' overlap": header(tensors=2, rest=tensor() + tensor(b"y", offset=96) + b"\0" * 512),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(tmp_path, message):
    out = tmp_path / "bad.gguf"
    out.write_bytes(HOSTILE[message])
    with pytest.raises(StorageError, match=message) as error:
        GGUF(out)
    assert "\n" not in str(error.value)


def test_cut_anywhere_the_file_is_refused(file, tmp_path):
    whole = file.read_bytes()
    out = tmp_path / "cut.gguf"
    for at in [*np.random.default_rng(0).integers(0, len(whole) - 1, 40).tolist(), len(whole) - 1]:
        out.write_bytes(whole[:at])
        with pytest.raises(StorageError, match=r"truncated|not a GGUF file|more than the|not UTF-8"):
            GGUF(out)


def test_changed_bytes_never_do_worse_than_an_error(file, tmp_path):
    """Bits flipped in the header: a model, or one line."""
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    out, refused = tmp_path / "flipped.gguf", []
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(0, 900)] ^= 1 << rng.integers(0, 8)
        out.write_bytes(data)
        try:
            import_gguf(out)
        except (UserError, StorageError) as e:
            refused.append(str(e))
    assert len(refused) > 10
    assert not [message for message in refused if "\n" in message]


def test_the_gate_without_llama_cpp_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    made = export_gguf(LLAMA, perturbed(LLAMA), tmp_path / "a.gguf", tokenizer=tokenizer())
    assert [check.passed for check in made.checks] == [True, True, None]
    assert "--reference-python" in made.checks[-1].found
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize(
    "decoder", [LLAMA, gpt2(layers=2, width=64, heads=4, vocab=270, context=128)], ids=["llama", "gpt2"]
)
def test_stock_llama_cpp_agrees(tmp_path, reference, decoder, dtype):
    made = export_gguf(
        decoder, perturbed(decoder), tmp_path / "a.gguf", tokenizer=tokenizer(), dtype=dtype,
        facts=Facts(name="Small", licence="apache-2.0"), reference_python=reference.python,
    )  # fmt: skip
    assert [check.passed for check in made.checks] == [True, True if dtype == "float32" else None, True, True, True]
    about = GGUF(tmp_path / "a.gguf").metadata
    assert (about["general.name"], about["general.license"]) == ("Small", "apache-2.0")


def test_a_key_that_only_llama_cpp_reads_wrongly_fails_the_gate(tmp_path, reference, monkeypatch):
    """What our own reader cannot notice: the tensors are right, the hyperparameters are not."""
    faithful = gguf_export.write_gguf

    def unfaithful(file, decoder, params, **options):
        out = faithful(file, decoder, params, **options)
        patched(file, file.with_suffix(".other"), **{"llama.rope.freq_base": 5e4})
        file.with_suffix(".other").replace(file)
        return out

    monkeypatch.setattr(gguf_export, "write_gguf", unfaithful)
    with pytest.raises(Rejected, match=r"llama\.cpp \(xllamacpp [\d.]+\): tokens: .*a\.gguf\.failed") as error:
        export_gguf(
            LLAMA, perturbed(LLAMA), tmp_path / "a.gguf", tokenizer=tokenizer(), reference_python=reference.python
        )
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.gguf.failed"]


@pytest.mark.parametrize("path", ["layers/mlp/up", "embed/table", "final_norm/scale"])
def test_a_wrong_tensor_fails_the_gate_by_name(tmp_path, monkeypatch, path):
    faithful = gguf_export.write_gguf

    def unfaithful(file, decoder, params, **options):
        wrong = jax.tree.map(np.array, params)
        tree.flatten(wrong)[path][...] *= 1.01
        return faithful(file, decoder, wrong, **options)

    monkeypatch.setattr(gguf_export, "write_gguf", unfaithful)
    name = {"layers/mlp/up": r"blk\.0\.ffn_up", "embed/table": "token_embd", "final_norm/scale": "output_norm"}[path]
    with pytest.raises(Rejected, match=rf"reload: tensors \(q8_0\): \d differ, first {name}\.weight"):
        export_gguf(LLAMA, perturbed(LLAMA), tmp_path / "a.gguf", tokenizer=tokenizer(), dtype="q8_0")


def test_what_is_there_is_left_alone(tmp_path):
    out = tmp_path / "a.gguf"
    out.write_text("years of work")
    arguments = (LLAMA, perturbed(LLAMA), out)
    with pytest.raises(UserError, match="already exists; choose another name or add --overwrite"):
        export_gguf(*arguments, tokenizer=tokenizer())
    with pytest.raises(UserError, match="is not a GGUF file, so it is not replaced"):
        export_gguf(*arguments, tokenizer=tokenizer(), overwrite=True)
    assert out.read_text() == "years of work"
    out.unlink()
    export_gguf(*arguments, tokenizer=tokenizer())
    first = out.read_bytes()
    export_gguf(LLAMA, perturbed(LLAMA, seed=1), out, tokenizer=tokenizer(), overwrite=True)
    assert out.read_bytes() != first
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_what_a_dead_process_began_is_removed(tmp_path):
    import socket

    left = tmp_path / f".a.gguf.partial-{socket.gethostname()}-999999999"
    left.write_bytes(b"half")
    export_gguf(LLAMA, perturbed(LLAMA), tmp_path / "a.gguf", tokenizer=tokenizer())
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export_gguf(LLAMA, perturbed(LLAMA), tmp_path / "a.gguf", tokenizer=tokenizer())
    assert os.listdir(tmp_path) == []


def test_what_llama_cpp_cannot_compute_is_refused_before_anything_is_written(tmp_path):
    other = gpt2(layers=1, width=32, heads=2, vocab=270, context=64, activation=gelu)
    with pytest.raises(UserError, match="activation_function = 'gelu'"):
        export_gguf(other, perturbed(other), tmp_path / "a.gguf", tokenizer=tokenizer())
    broken = jax.tree.map(np.array, perturbed(LLAMA))
    broken["final_norm"]["scale"][3] = np.nan
    with pytest.raises(UserError, match=r"output_norm\.weight holds NaN or Inf as F32"):
        export_gguf(LLAMA, broken, tmp_path / "a.gguf", tokenizer=tokenizer())
    broken["final_norm"]["scale"][3] = 1
    broken["embed"]["table"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"token_embd\.weight holds NaN or Inf as F16"):
        export_gguf(LLAMA, broken, tmp_path / "a.gguf", tokenizer=tokenizer(), dtype="float16")
    assert os.listdir(tmp_path) == []


def test_donated_parameters_are_gone(tmp_path):
    params = jax.tree.map(jax.numpy.array, perturbed(LLAMA))
    export_gguf(LLAMA, params, tmp_path / "a.gguf", tokenizer=tokenizer(), donate=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_the_metadata_is_what_llama_cpp_documents(file):
    about = GGUF(file).metadata
    assert about["general.architecture"] == "llama"
    assert about["llama.rope.dimension_count"] == 16
    assert about["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert json.dumps(about["tokenizer.ggml.tokens"][-2:]) == '["[PAD268]", "[PAD269]"]'
