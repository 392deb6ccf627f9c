"""Quantized models as GGUF: what was trained comes back bit for bit, and stock llama.cpp computes with it."""

import os
import pathlib
import re
import subprocess
import textwrap

import jax
import numpy as np
import pytest
from contract import shapes

from slmjax import tree
from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.into_memory import with_codes
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.convert import gate
from slmjax.convert.folder import Rejected
from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf import layouts
from slmjax.convert.gguf.activations import rounding
from slmjax.convert.gguf.export import export_gguf
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.runs.exporting import Export
from slmjax.runs.exporting import write_gguf as write_gguf_of
from slmjax.runs.loading import Loaded

DECODER = llama(layers=2, width=256, vocab=270, hidden=512, heads=4, kv_heads=2, context=128)
ATTENTION, MLP = ("layers/attn/*",), ("layers/mlp/*",)
PAIRS = {  # quantizers of attention and of the MLP, with their types
    "8 and 4 bits": (Symmetric(bits=8), Symmetric(bits=4, granularity=PerGroup(size=32)), "Q8_0", "Q4_0"),
    "3 and 2 bits": (LSQ(bits=3), LSQ(bits=2), "Q3_K", "TQ2_0"),
    "balanced, ternary": (Balanced(), BitNet(), "Q2_K", "TQ1_0"),
    "2 bits in groups, SEQ": (Symmetric(bits=2, fill=True, granularity=PerGroup(size=64)), SEQ(), "Q2_0", "Q2_K"),
    "binary, zero points": (Binary(), Asymmetric(bits=4), "Q1_0", "Q4_K"),
    "5 and 6 bits": (Symmetric(bits=5), Symmetric(bits=6), "Q5_0", "Q6_K"),
}


def tokenizer():
    made = Bytes().make([], pathlib.Path())
    return Tokenizer(made.raw, bos=made.bos, eos=made.eos)


def perturbed(decoder, seed=0):
    """Random parameters, with logits of the size of a trained model's."""
    params = shapes.perturbed(decoder, seed)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 0.2
    return params


def quantized(decoder, *rules, seed=0):
    """(parameters that the model computes with, their codes) at the beginning of quantization-aware training."""
    params = perturbed(decoder, seed)
    view = Quantize(rules=rules).build(decoder.build().axes)
    own, state = view.init(params, jax.random.key(0))
    return view.evaluate(params, own, state), view.pack(params, own, state)


def of_pair(name):
    attention, mlp, *_ = PAIRS[name]
    return quantized(DECODER, Rule(quantizer=attention, patterns=ATTENTION), Rule(quantizer=mlp, patterns=MLP))


def kl_of(text):
    """The first number."""
    return float(re.search(r"-?\d\.\de[+-]\d+", text)[0])


@pytest.fixture(autouse=True)
def without_reference(monkeypatch):
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


def same(found, expected):
    for path, x in tree.flatten(expected).items():
        x = np.asarray(x)
        np.testing.assert_array_equal(np.asarray(tree.flatten(found)[path]).view(np.uint32), x.view(np.uint32), path)


@pytest.mark.parametrize("name", PAIRS)
def test_what_was_trained_comes_back_bit_for_bit_in_its_type(tmp_path, name):
    params, packed = of_pair(name)
    file = tmp_path / "a.gguf"
    write_gguf(file, DECODER, params, tokenizer=tokenizer(), packed=packed)
    back = import_gguf(file)
    assert back.decoder == DECODER
    same(back.params, params)
    opened = GGUF(file)
    weights, size = 0, 0
    for tensor, info in opened.infos.items():
        kind = (
            PAIRS[name][2 if "attn_" in tensor else 3] if tensor.startswith("blk") and "norm" not in tensor else "F32"
        )
        assert layouts.NAMES[info.kind] == kind, tensor
        if kind != "F32":
            bits = layouts.FORMATS[info.kind].bits
            assert info.size * 8 == np.prod(info.shape) * bits
            weights, size = weights + np.prod(info.shape), size + info.size
    assert weights == sum(np.asarray(p.codes.codes).size for p in packed.values())
    plain = tmp_path / "plain.gguf"
    write_gguf(plain, DECODER, params, tokenizer=tokenizer())
    saved = plain.stat().st_size - file.stat().st_size
    assert saved == 4 * weights - size, "nothing else became larger"


def test_the_rest_of_the_model_is_written_as_dtype_says(tmp_path):
    params, packed = of_pair("balanced, ternary")
    made = export_gguf(DECODER, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed, dtype="float16")
    opened = GGUF(tmp_path / "a.gguf")
    kinds = {tensor: layouts.NAMES[info.kind] for tensor, info in opened.infos.items()}
    assert kinds["token_embd.weight"] == "F16"
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.1.ffn_down.weight"]) == ("Q2_K", "TQ1_0")
    assert opened.metadata["general.file_type"] == 36, "most weights are TQ1_0"
    (size,) = (check.found for check in made.checks if check.name == "size")
    assert size.startswith(f"{(tmp_path / 'a.gguf').stat().st_size} bytes; ")
    assert "F16 69120 weights of 16 bits" in size
    assert "TQ1_0 786432 weights of 1.688 bits" in size
    same(
        {k: v for k, v in import_gguf(tmp_path / "a.gguf").params.items() if k == "layers"},
        {k: v for k, v in params.items() if k == "layers"},
    )


def test_embeddings_and_a_table_of_outputs_can_be_packed(tmp_path):
    decoder = llama(layers=1, width=256, vocab=270, hidden=256, heads=4, kv_heads=2, context=128, tied=False)
    params, packed = quantized(
        decoder,
        Rule(quantizer=Symmetric(bits=8), patterns=("embed/*",)),
        Rule(quantizer=Symmetric(bits=4), patterns=("unembed/*",)),
    )
    assert len(packed) == 2
    export_gguf(decoder, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed)
    kinds = {name: layouts.NAMES[info.kind] for name, info in GGUF(tmp_path / "a.gguf").infos.items()}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q4_0")
    same(import_gguf(tmp_path / "a.gguf").params, params)


@pytest.mark.parametrize("name", PAIRS)
def test_stock_llama_cpp_agrees(tmp_path, reference, name):
    params, packed = of_pair(name)
    made = export_gguf(
        DECODER, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed, reference_python=reference.python
    )
    assert [check.passed for check in made.checks] == [True, None, True, True, True, True, True]
    assert [check.name.split(": ")[-1] for check in made.checks if "llama.cpp" in check.name] == [
        "tokens", "KL", "loss", "tokenizer"
    ]  # fmt: skip
    # what remains is an activation here and there that is rounded to the neighbouring code
    (found,) = (check.found for check in made.checks if check.name.endswith(": KL"))
    assert kl_of(found.split(", ")[1]) < 2e-4


STOCK = """
    import ctypes, glob, sys
    import numpy as np
    import xllamacpp
    library = ctypes.CDLL(glob.glob(xllamacpp.__path__[0] + "/*.so")[0])
    pointer = ctypes.c_void_p
    def unpack(name, raw, weights):
        out = np.empty(weights, np.float32)
        f = getattr(library, "dequantize_row_" + name)
        f.restype, f.argtypes = None, [pointer, pointer, ctypes.c_int64]
        f(raw.ctypes.data, out.ctypes.data, weights)
        return out
    def pack(name, x, size):
        out = np.empty(size, np.uint8)
        f = getattr(library, "quantize_" + name)
        f.restype, f.argtypes = ctypes.c_size_t, [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer]
        assert f(x.ctypes.data, out.ctypes.data, len(x), x.shape[1], None) == size
        return out
    given = np.load(sys.argv[1])
    done = {}
    for key in given:
        what, name, number, tensor = key.split(":")
        done[tensor] = {"unpack": unpack, "pack": pack}[what](name, np.ascontiguousarray(given[key]), int(number))
    np.savez(sys.argv[2], **done)
"""


def by_llama_cpp(python, folder, arrays):
    """{"unpack:TYPE:WEIGHTS:TENSOR": bytes, "pack:TYPE:BYTES:TENSOR": values} -> {TENSOR: what llama.cpp's own
    functions, called in its library, make of it}."""
    np.savez(folder / "in.npz", **arrays)
    command = [python, "-c", textwrap.dedent(STOCK), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as found:
        return dict(found)


def spelled(number):
    """The type in the names of llama.cpp's functions: q2_K."""
    return layouts.NAMES[number].lower().replace("_k", "_K")


def raw_of(file, name):
    info = GGUF(file).infos[name]
    return np.frombuffer(file.read_bytes()[info.start : info.start + info.size], np.uint8)


def test_llama_cpp_s_own_functions_unpack_the_values_of_training(tmp_path, reference):
    """All types, those among them that no other library reads."""
    expected, arrays = {}, {}
    for i, name in enumerate(PAIRS):
        params, packed = of_pair(name)
        file = tmp_path / f"{i}.gguf"
        write_gguf(file, DECODER, params, tokenizer=tokenizer(), packed=packed)
        opened = GGUF(file)
        for tensor in ("blk.1.attn_k.weight", "blk.1.ffn_down.weight"):
            x = opened[tensor]
            expected[f"{i}.{tensor}"] = x.reshape(-1)
            arrays[f"unpack:{spelled(opened.infos[tensor].kind)}:{x.size}:{i}.{tensor}"] = raw_of(file, tensor)
    found = by_llama_cpp(reference.python, tmp_path, arrays)
    assert found.keys() == expected.keys()
    for tensor, x in found.items():
        np.testing.assert_array_equal(x, expected[tensor], tensor)


@pytest.mark.parametrize(
    ("quantizer", "kind", "worse"), [(LSQ(bits=2), layouts.TQ2_0, 100), (SEQ(), layouts.Q2_K, 3)], ids=["LSQ", "SEQ"]
)
def test_a_model_rounded_again_fails_the_check(tmp_path, reference, quantizer, kind, worse):
    """The types are right and the file loads, but its codes are those that llama.cpp's own quantizer finds in the
    trained values, instead of the trained codes."""
    params, packed = quantized(DECODER, Rule(quantizer=quantizer))
    file, changed = tmp_path / "a.gguf", tmp_path / "changed.gguf"
    write_gguf(file, DECODER, params, tokenizer=tokenizer(), packed=packed)
    opened = GGUF(file)
    names = [name for name, info in opened.infos.items() if info.kind == kind.number]
    assert len(names) == 14
    again = by_llama_cpp(
        reference.python,
        tmp_path,
        {f"pack:{spelled(kind.number)}:{opened.infos[name].size}:{name}": opened[name] for name in names},
    )
    data = bytearray(file.read_bytes())
    for name, raw in again.items():
        info = opened.infos[name]
        data[info.start : info.start + info.size] = raw.tobytes()
    changed.write_bytes(data)
    probe = gate.make_probe(np.random.default_rng(0).integers(0, 256, (3, 64)), DECODER.context)
    limit = gguf_gate.limit_of("float32", 0.0, quantized=True)
    given = (DECODER, params, reference.python, probe, tokenizer(), limit, rounding(packed, "float32"))
    good, bad = (gguf_gate.check_llama_cpp(each, *given) for each in (file, changed))
    print(*good, *bad, sep="\n")
    assert [check.passed for check in good] == [True, True, True]
    tokens, divergence, words = bad
    assert (tokens.passed, divergence.passed, words.passed) == (False, False, True)
    assert kl_of(divergence.found) > worse * kl_of(good[1].found)


def test_the_gate_names_a_tensor_whose_codes_differ(tmp_path, monkeypatch):
    params, packed = of_pair("3 and 2 bits")
    carrier = layouts.Q3_K

    def off(raw):
        d, levels = carrier.read(raw)
        levels[0, 0] = -levels[0, 0] or 1
        return layouts.Multiples(d, levels)

    monkeypatch.setitem(layouts.FORMATS, carrier.number, carrier._replace(read=off))
    with pytest.raises(Rejected, match=r"reload: tensors \(float32\): 8 differ, first blk\.0\.attn_q\.weight"):
        export_gguf(DECODER, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed)
    assert os.listdir(tmp_path) == ["a.gguf.failed"]


def test_what_no_type_holds_is_refused_before_anything_is_written(tmp_path):
    params, packed = quantized(DECODER, Rule(quantizer=Symmetric(bits=4, granularity=PerGroup(size=16))))
    with pytest.raises(
        UserError, match=r"blk\.0\.attn_\w\.weight \[256, 256\], the codes -8 to 7, a scale for each 16"
    ):
        export_gguf(DECODER, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed)
    with pytest.raises(UserError, match=r"layers/attn/k does not have the values of its codes"):
        export_gguf(DECODER, perturbed(DECODER), tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed)
    assert os.listdir(tmp_path) == []


def test_the_export_verb_packs_what_a_run_has_quantized(tmp_path):
    params, packed = of_pair("8 and 4 bits")
    loaded = Loaded(
        decoder=DECODER,
        weights=with_codes(params, packed),
        tokenizer_path=None,
        embedded=tokenizer(),
        source=tmp_path,
        config={},
    )
    write_gguf_of(Export(out=tmp_path / "a.gguf"), loaded)
    kinds = {layouts.NAMES[info.kind] for info in GGUF(tmp_path / "a.gguf").infos.values()}
    assert kinds == {"F32", "Q8_0", "Q4_0"}
