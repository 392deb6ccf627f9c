"""MXFP4 and NVFP4 in files: both scale conventions, read back bit for bit, by stock libraries, and read wrongly."""

import json
import subprocess

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from contract.shapes import perturbed
from safetensors.numpy import load_file, save_file
from test_gguf_packed import by_llama_cpp, raw_of, spelled, tokenizer

from slmjax.compress.quant.float4 import MXFP4, NVFP4, Float4, scale_of_matrix
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.convert import gate, pack_float4
from slmjax.convert.export import export_hf
from slmjax.convert.folder import MARK, Rejected
from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf import layouts
from slmjax.convert.gguf.activations import rounding
from slmjax.convert.gguf.carriers import carrier_of
from slmjax.convert.gguf.export import export_gguf
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import import_gguf, scale_name, write_gguf
from slmjax.convert.hf import import_hf
from slmjax.convert.packed import PackedTensor
from slmjax.convert.safetensors_io import Tensors, write
from slmjax.errors import StorageError, UserError
from slmjax.models.families.llama import llama
from slmjax.tree import flatten

LLAMA = llama(layers=2, width=64, heads=4, kv_heads=2, hidden=128, vocab=270, context=64, tied=False)
ATTENTION, MLP, HEAD = ("layers/attn/*",), ("layers/mlp/*",), ("unembed/table",)
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The gate runs stock programs only where a test says so."""
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


def quantized(*rules):
    """Parameters as the model computes with them, with logits of the size of a trained model's, and their codes."""
    params = perturbed(LLAMA)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 0.2
    view = Quantize(rules=rules).build(LLAMA.axes())
    own, state = view.init(params, jax.random.key(0))
    return view.evaluate(params, own, state), view.pack(params, own, state)


def of_matrix(steps) -> float:
    found = scale_of_matrix(steps)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def both():
    """All in NVFP4 but for attention, which is in MXFP4."""
    return quantized(Rule(quantizer=MXFP4(), patterns=ATTENTION), Rule(quantizer=NVFP4(), patterns=MLP + HEAD))


def bits(x):
    return np.ascontiguousarray(np.asarray(x, np.float32)).view(np.uint32)


def in_bfloat16(params, packed):
    """What a file of bfloat16 makes of the parameters that are not quantized."""
    flat = flatten(params)
    return {p: np.asarray(x) if p in packed else np.asarray(x).astype(ml_dtypes.bfloat16) for p, x in flat.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, both, reference):
    """Exported, and checked by stock transformers."""
    path = tmp_path_factory.mktemp("float4") / "hf"
    given = {"packed": both[1], "dtype": "bfloat16", "reference_python": reference.python}
    assert [check.passed for check in export_hf(LLAMA, both[0], path, **given).checks] == [True] * 6
    return path


def test_a_hugging_face_folder_comes_back(folder, both):
    """Stock transformers has computed the same logits, in the gate."""
    params, packed = both
    size = next(x for x in json.loads((folder / MARK).read_text())["checks"] if x["name"].startswith("size"))
    attention, mlp = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 3 * 64 * 128
    head = 270 * 64
    assert size["expected"] == f"{attention * 17 // 32 + (mlp + head) * 9 // 16 + 7 * 4} bytes"
    back = flatten(import_hf(folder).params)
    for path, x in in_bfloat16(params, packed).items():
        np.testing.assert_array_equal(bits(back[path]), bits(x), path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert sorted(group["format"] for group in config["config_groups"].values()) == [
        "mxfp4-pack-quantized", "nvfp4-pack-quantized"
    ]  # fmt: skip
    stored = Tensors(folder)
    steps = packed["layers/mlp/down"].codes.steps[1]
    (divisor,) = stored[f"{DOWN}.weight_global_scale"]
    assert divisor == 1 / of_matrix(steps), "compressed-tensors divides by it"


def test_compressed_tensors_finds_the_same_scales_and_codes(tmp_path, folder, both, reference):
    """Its exponents are those of `even`; NVFP4 is given our scale of the matrix. Used as it is, a folder computes in
    bfloat16; in float32 stock transformers fails, which is why no such file is written."""
    w = (np.random.default_rng(0).normal(size=(48, 64)) * 0.05).astype(np.float32)
    cut = {q: q.granularity.cut((64, 48), ("embed", "mlp"), "w") for q in (MXFP4(exponent="even"), NVFP4())}
    ours = {}
    for (quantizer, blocks), name in zip(cut.items(), ("mxfp4", "nvfp4"), strict=True):
        codes = quantizer.pack(w.T, blocks)
        steps = np.asarray(codes.steps).T
        ours[name] = PackedTensor(np.asarray(codes.codes).T, steps, None, Float4())
    scale = of_matrix(ours["nvfp4"].steps)
    request: dict[str, np.ndarray] = {"w.mxfp4": w, "w.nvfp4": w.copy(), "global": np.array([1 / scale], np.float32)}
    request["tokens"] = np.random.default_rng(0).integers(0, 97, (2, 16), dtype=np.int32)
    names = json.dumps([str(folder)])
    save_file(request, tmp_path / "in.safetensors", {"folders": names})
    program = __file__.replace("convert/test_float4_files.py", "reference/float4.py")
    command = [reference.python, program, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in ours.items():
        arrays = pack_float4.carrier("w", tensor).pack("w", tensor, "bfloat16")
        np.testing.assert_array_equal(found[f"{name}.scale"], arrays["weight_scale"].view(np.uint8))
        theirs = pack_float4.unpack_e2m1(found[f"{name}.packed"])  # a zero of theirs may have a sign
        np.testing.assert_array_equal(theirs, pack_float4.unpack_e2m1(arrays["weight_packed"]))
        np.testing.assert_array_equal(found[f"{name}.values"], tensor.values())
    for path, module in (("layers/attn/q", Q), ("layers/mlp/down", DOWN)):
        values = both[1][path].values()[1]
        theirs = found[f"weights.0.{module}.weight"]
        np.testing.assert_array_equal(bits(theirs), bits(values.reshape(len(values), -1).T))
    assert np.isfinite(found["logits.0"]).all()
    assert b"same dtype" in found["error"].tobytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory, both):
    path = tmp_path_factory.mktemp("float4") / "a.gguf"
    write_gguf(path, LLAMA, both[0], tokenizer=tokenizer(), packed=both[1])
    return path, *both


def test_a_gguf_file_comes_back_bit_for_bit(file):
    path, params, packed = file
    back = flatten(import_gguf(path).params)
    for key, x in flatten(params).items():
        np.testing.assert_array_equal(bits(back[key]), bits(x), key)
    opened = GGUF(path)
    assert opened.metadata["general.file_type"] == 39, "most weights are NVFP4"
    for name, kind, key in (
        ("blk.1.attn_output.weight", "MXFP4", None),
        ("blk.1.ffn_down.weight", "NVFP4", "layers/mlp/down"),
    ):
        info, type_ = opened.infos[name], gguf.GGMLQuantizationType[kind]
        assert info.kind == type_.value
        assert info.size * 8 == np.prod(info.shape) * {"MXFP4": 4.25, "NVFP4": 4.5}[kind]
        found = gguf.dequantize(raw_of(path, name).reshape(-1, layouts.sizes_of(info.kind)[1]), type_)
        scale = 1.0 if key is None else of_matrix(packed[key].codes.steps[1])
        np.testing.assert_array_equal(found.reshape(info.shape) * np.float32(scale), opened[name])


def test_llama_cpp_agrees_and_the_other_convention_fails(tmp_path, file, reference):
    """llama.cpp multiplies by the scale of the matrix; the file whose scales are those of compressed-tensors, which
    divides by them, loads as well."""
    path, params, packed = file
    opened, arrays, wanted = GGUF(path), {}, {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        x = opened[name]
        arrays[f"unpack:{spelled(opened.infos[name].kind)}:{x.size}:{name}"] = raw_of(path, name)
        wanted[name] = x.reshape(-1)
    found = by_llama_cpp(reference.python, tmp_path, arrays)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], wanted["blk.0.attn_q.weight"])
    scale = np.float32(of_matrix(packed["layers/mlp/up"].codes.steps[0]))
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"] * scale, wanted["blk.0.ffn_up.weight"])

    made = export_gguf(
        LLAMA, params, tmp_path / "a.gguf", tokenizer=tokenizer(), packed=packed, reference_python=reference.python
    )
    assert [check.passed for check in made.checks] == [True, None, True, True, True, True, True]
    data, reader = bytearray(path.read_bytes()), gguf.GGUFReader(path)
    scales = [tensor for tensor in reader.tensors if tensor.name.endswith(".scale")]
    assert len(scales) == 7
    for tensor in scales:
        inverse = 1 / np.asarray(tensor.data, np.float32)
        data[tensor.data_offset : tensor.data_offset + 4] = inverse.tobytes()
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data)
    probe = gate.make_probe(np.random.default_rng(0).integers(0, 256, (3, 64)), LLAMA.context)
    limit = gguf_gate.limit_of("float32", 0.0, quantized=True)
    tokens, divergence, _ = gguf_gate.check_llama_cpp(
        changed, LLAMA, params, reference.python, probe, tokenizer(), limit, rounding(packed, "float32")
    )
    assert (tokens.passed, divergence.passed) == (False, False)


def test_the_other_convention_in_a_folder_fails_the_gate(tmp_path, both, monkeypatch):
    params, packed = both
    faithful = pack_float4.Float4Carrier.pack

    def multiplied(self, *given):
        arrays = faithful(self, *given)
        return {key: 1 / x if key == pack_float4.GLOBAL else x for key, x in arrays.items()}

    monkeypatch.setattr(pack_float4.Float4Carrier, "pack", multiplied)
    with pytest.raises(Rejected, match=r"reload: parameters .*4 differ, first layers/mlp"):
        export_hf(LLAMA, params, tmp_path / "hf", dtype="bfloat16", packed=packed)


@pytest.mark.fast
def test_what_cannot_be_stored_is_refused_in_one_line():
    tensor = PackedTensor(np.zeros((2, 32), np.int16), np.ones((2, 2), np.float32), None, Float4())
    how = pack_float4.carrier("m", tensor)
    for name in ("float32", "float16"):
        with pytest.raises(UserError, match=f"m is in NVFP4, .*but --dtype is {name}; use --dtype bfloat16 "):
            how.pack("m", tensor, name)
    with pytest.raises(UserError, match=r"scale for each 16 of a row, is neither MXFP4 .* nor NVFP4"):
        pack_float4.carrier("m", tensor._replace(steps=np.array([[1, 1.03], [1, 1]], np.float32)))
    with pytest.raises(
        UserError, match=r"m \[2, 32\], in floats of 4 bits, fits no .*NVFP4 needs rows of a multiple of 64"
    ):
        carrier_of("m", tensor)
    with pytest.raises(UserError, match=r"token_embd.weight is quantized to NVFP4, but .*MXFP4\(\), or leave it out"):
        scale_name("token_embd.weight")


DAMAGED = {
    "no scale": ({f"{Q}.weight_scale": None}, "weight_scale is missing"),
    "a scale of floats": ({f"{Q}.weight_scale": np.ones((64, 2), np.float32)}, r"weight_scale is BF16 .*MXFP4"),
    "scales of others": ({f"{Q}.weight_scale": np.ones((64, 4), np.uint8)}, r"expected U8 \[64, 2\]"),
    "an exponent that is NaN": ({f"{Q}.weight_scale": np.full((64, 2), 255, np.uint8)}, "weights that are NaN or Inf"),
    "no codes": ({f"{Q}.weight_packed": np.zeros((64, 0), np.uint8)}, "does not fit weight_packed"),
    "two scales": ({f"{DOWN}.weight_global_scale": np.ones(2, np.float32)}, r"weight_global_scale is F32 \[2\]"),
    "a scale of 0": ({f"{DOWN}.weight_global_scale": np.zeros(1, np.float32)}, "weights that are NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_refused(tmp_path, folder, name):
    changes, message = DAMAGED[name]
    tensors = {**Tensors(folder), **changes}
    kept = ((key, x) for key, x in tensors.items() if x is not None)
    write(tmp_path, kept, dtype="bfloat16", unrounded=(pack_float4.GLOBAL,))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(StorageError, match=message):
        import_hf(tmp_path)


def test_a_gguf_scale_that_is_no_number_is_refused(tmp_path, file):
    data = file[0].read_bytes()
    (tensor,) = (t for t in gguf.GGUFReader(file[0]).tensors if t.name == "blk.0.ffn_up.scale")
    changed = tmp_path / "a.gguf"
    changed.write_bytes(data[: tensor.data_offset] + np.float32(np.nan).tobytes() + data[tensor.data_offset + 4 :])
    with pytest.raises(StorageError, match=r"blk\.0\.ffn_up\.weight' holds NaN or Inf"):
        import_gguf(changed)
