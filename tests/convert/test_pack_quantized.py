"""Quantized exports: packing against the definition and the reference's, every quantizer through stock transformers."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from contract.shapes import perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from slmjax.compress.quant.blocks import PerGroup, PerTensor
from slmjax.compress.quant.grids import Nearest
from slmjax.compress.quant.into_memory import with_codes
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.convert import export, gate
from slmjax.convert.export import export_hf
from slmjax.convert.folder import MARK, Rejected
from slmjax.convert.hf import import_hf, write_hf
from slmjax.convert.pack_quantized import Carrier, carrier, pack_codes, patterns, unpack, unpack_codes
from slmjax.convert.packed import PackedTensor
from slmjax.convert.safetensors_io import INDEX, Tensors
from slmjax.errors import StorageError, UserError
from slmjax.models.families.common.llama_like import Sizes
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.gpt_neox import gpt_neox
from slmjax.models.families.llama import llama
from slmjax.models.families.phi3 import phi3
from slmjax.nn.position import Rope
from slmjax.runs.exporting import Export
from slmjax.runs.exporting import write_hf as write
from slmjax.runs.loading import Loaded
from slmjax.tree import flatten

SIZES = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 96, "vocab": 97, "context": 64}
LLAMA = llama(**SIZES, tied=False)
MATRICES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
MODULES = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
MODELS = {
    "symmetric": [
        Symmetric(bits=2),
        Symmetric(bits=3, granularity=PerGroup(size=32)),
        Symmetric(bits=4, granularity=PerTensor()),
        Symmetric(bits=5, granularity=PerGroup(size=16)),  # as wide as a head
        Symmetric(bits=6),
        Symmetric(bits=7, fill=True),
        Symmetric(bits=8, granularity=PerGroup(size=32)),
        LSQ(bits=8),
    ],
    "asymmetric and levels": [
        Asymmetric(bits=4),
        Asymmetric(bits=4, granularity=PerGroup(size=16)),
        Asymmetric(bits=3, granularity=PerTensor()),
        LSQ(bits=4, granularity=PerGroup(size=32)),
        SEQ(levels=3),
        SEQ(levels=4, granularity=PerGroup(size=32)),
        Balanced(),
    ],
    "two values": [
        Binary(),
        BitNet(),
        Balanced(granularity=PerGroup(size=16)),
        Binary(granularity=PerTensor()),
        SEQ(levels=3, granularity=PerGroup(size=16)),
        Asymmetric(bits=1),
        SEQ(levels=8),
    ],
}
"""Quantizers of `MATRICES`, then of the head"""


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The gate runs stock transformers only where a test says so."""
    monkeypatch.delenv(gate.ENVIRONMENT, raising=False)


def quantized(decoder, rules, params=None):
    """Parameters as the model computes with them, and their codes."""
    params = perturbed(decoder) if params is None else params
    view = Quantize(rules=tuple(rules)).build(decoder.axes())
    own, state = view.init(params, jax.random.key(0))
    return view.evaluate(params, own, state), view.pack(params, own, state)


def rules_of(name):
    paths = [*(f"layers/{path}" for path in MATRICES), "unembed/table"]
    return [Rule(quantizer=q, patterns=(path,)) for q, path in zip(MODELS[name], paths, strict=False)]


def every(quantizer):
    return [Rule(quantizer=quantizer)]


@pytest.fixture(scope="module")
def models():
    return {name: quantized(LLAMA, rules_of(name)) for name in MODELS}


def codes_of(bits, shape, seed=0):
    return np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int16)


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), n=st.integers(1, 140), seed=st.integers(0, 99))
def test_packed_codes_are_one_number_a_row_written_in_base_two(bits, rows, n, seed):
    codes = codes_of(bits, (rows, n), seed)
    packed = pack_codes(codes, bits)
    for row, words in zip(codes, packed, strict=True):
        number = sum((int(code) + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(row))
        assert words.tobytes() == number.to_bytes(4 * -(-n * bits // 32), "little")
    np.testing.assert_array_equal(unpack_codes(packed, bits, n), codes)


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_tensor_comes_back_bit_for_bit_or_is_refused(data):
    bits, out, groups = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    width = groups * data.draw(st.integers(1, 20))
    kind = data.draw(st.sampled_from(["symmetric", "between", "zeros"]))
    low, high = (0, 2**bits - 1) if kind == "zeros" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensor = PackedTensor(
        codes=rng.integers(low, high + 1, (out, width)).astype(np.int16),
        steps=rng.uniform(1e-4, 1, (out, groups)).astype(np.float32),
        zeros=rng.integers(low, high + 1, (out, groups)).astype(np.int16) if kind == "zeros" else None,
        grid=Nearest(low=low, high=high, offset=0.5 if kind == "between" else 0.0),
    )
    if kind != "symmetric" and bits == 8:
        what = {"between": r"levels from -127\.5 to 127\.5 steps", "zeros": "levels and zero points"}[kind]
        with pytest.raises(UserError, match=f"^m has 256 {what}, which take 9 bits"):
            carrier("m", tensor)
        return
    how = carrier("m", tensor)
    assert how.bits == bits + (kind != "symmetric")
    arrays = how.pack("m", tensor, "float32")
    assert unpack(arrays, how.bits).tobytes() == tensor.values().tobytes()
    assert sum(x.nbytes for x in arrays.values()) == how.bytes((out, width), "float32")


@pytest.mark.fast
def test_bytes_of_known_matrices():
    """By hand: int32 words of each row, scales, and 16 bytes for the shape."""
    assert Carrier(bits=2).bytes((64, 128), "float32") == 64 * 32 + 64 * 4 + 16
    assert Carrier(bits=3).bytes((6, 40), "bfloat16") == 6 * 4 * 4 + 6 * 2 + 16  # 120 bits: 4 words
    assert Carrier(bits=4, strategy="group", group=32).bytes((8, 64), "float16") == 8 * 32 + 8 * 2 * 2 + 16
    assert Carrier(bits=2, strategy="tensor").bytes((64, 128), "float32") == 64 * 32 + 4 + 16


@pytest.mark.fast
def test_patterns_match_their_modules_and_no_others():
    layer = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("up_proj", "down_proj")]
    everything = [*layer, "lm_head", "model.embed_tokens"]
    assert patterns([m for m in layer if "up" in m], everything) == [r"re:(.*\.)?layers\.\d+\.mlp\.up_proj$"]
    some = patterns([layer[0], layer[4]], everything)
    assert some == [r"re:(.*\.)?layers\.0\.mlp\.up_proj$", r"re:(.*\.)?layers\.2\.mlp\.up_proj$"]
    assert patterns(["lm_head"], everything) == [r"re:(.*\.)?lm_head$"]


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_loads_every_quantizer(tmp_path, reference, models, name):
    params, packed = models[name]
    options = {"shard_bytes": 20_000} if name == "two values" else {}
    made = export_hf(LLAMA, params, tmp_path / "hf", packed=packed, reference_python=reference.python, **options)
    assert [check.passed for check in made.checks] == [True] * 6, made.checks
    assert (tmp_path / "hf" / INDEX).is_file() == bool(options), "arrays of one matrix in several shards load, too"
    logits = next(check for check in made.checks if check.name.endswith(": logits") and "transformers" in check.name)
    assert float(logits.found.split()[1].rstrip(",")) <= 2e-6 * float(logits.expected.split()[1]) / gate.TOLERANCE
    record = json.loads((tmp_path / "hf" / MARK).read_text())["quantized"]
    tensors = Tensors(tmp_path / "hf")
    assert record["bytes_of_all_tensors"] == sum(x.nbytes for x in tensors.values())
    own = [k for k in tensors if k.rpartition(".")[2].startswith("weight_")]
    assert record["bytes"] == sum(tensors[k].nbytes for k in own) == sum(k["bytes"] for k in record["kinds"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert all(f"as {kind['carrier']}: {kind['bits_a_weight']:.3g} bits a weight" in card for kind in record["kinds"])
    back = flatten(import_hf(tmp_path / "hf").params)
    assert all(back[path].tobytes() == p.values().tobytes() for path, p in packed.items())


def with_zero_points(codes, scale, bits=3):
    """The arrays of a matrix as llm-compressor writes them: packed zero points beside the scales."""
    zeros = codes_of(bits, scale.shape, seed=2)
    return {
        "weight_packed": pack_codes(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array(codes.shape),
        "weight_zero_point": np.ascontiguousarray(pack_codes(zeros.T, bits).T),
    }


def ask(python, folder, tokens, codes, folders):
    """Runs reference/packed_weights.py."""
    tensors = {"tokens": tokens, **codes}
    save_file(tensors, folder / "request.safetensors", {"folders": json.dumps(list(map(str, folders)))})
    program = pathlib.Path(__file__).parents[1] / "reference" / "packed_weights.py"
    files = [str(folder / "request.safetensors"), str(folder / "answer.safetensors")]
    done = subprocess.run([python, str(program), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "answer.safetensors")


@pytest.mark.parametrize("version", ["reference", "reference4"])
def test_weights_in_stock_compressed_tensors_are_ours_bit_for_bit(tmp_path, request, models, version):
    """Loaded in float32, whatever the dtype of the file; the logits are exactly those of the weights stored as floats.
    Codes are packed into the same bytes, and a matrix with zero points unpacked into the same values."""
    python = request.getfixturevalue(version).python
    codes = {
        f"codes.{bits}.{i}": codes_of(bits, shape).astype(np.int8)
        for bits in range(1, 9)
        for i, shape in enumerate([(3, 64), (5, 37), (33, 1), (1, 200)])
    }
    cases = {}
    for name, (params, packed) in models.items():
        for dtype in ("float32", "float16") if name == "symmetric" else ("float32",):
            cases[f"{name} {dtype}"] = (params, packed, dtype)
    bfloat16 = every(Symmetric(bits=4, scale_type="bfloat16", granularity=PerGroup(size=32)))
    cases["bfloat16"] = (*quantized(LLAMA, bfloat16), "bfloat16")
    folders, plain = [], tmp_path / "plain"
    for name, (params, packed, dtype) in cases.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        write_hf(folders[-1], LLAMA, params, dtype=dtype, packed=packed)
    plain.mkdir()
    write_hf(plain, LLAMA, models["symmetric"][0])
    tokens = np.random.default_rng(0).integers(0, 97, (2, 32), dtype=np.int32)
    matrix = with_zero_points(codes_of(3, (37, 64)), np.random.default_rng(1).random((37, 4), np.float32))
    found = ask(
        python, tmp_path, tokens, codes | {f"matrix.3.16.{key}": x for key, x in matrix.items()}, [*folders, plain]
    )
    assert found["matrix"].tobytes() == unpack(matrix, 3).tobytes()

    for key, x in codes.items():
        bits = int(key.split(".")[1])
        np.testing.assert_array_equal(found[key], pack_codes(x, bits))
    for i, (params, packed, _) in enumerate(cases.values()):
        unpacked = flatten(params)
        for path, p in packed.items():
            assert np.asarray(unpacked[path]).tobytes() == p.values().tobytes(), path
        for layer in range(2):
            for path, module in zip(MATRICES, MODULES, strict=True):
                ours = packed[f"layers/{path}"].values()[layer]
                ours = ours.reshape(-1, 64) if path == "attn/o" else ours.reshape(len(ours), -1)
                theirs = found[f"weights.{i}.model.layers.{layer}.{module}.weight"]
                assert theirs.dtype == np.float32
                np.testing.assert_array_equal(theirs, ours.T, err_msg=f"{i} {module}")
                assert theirs.tobytes() == np.ascontiguousarray(ours.T).tobytes()
    both = list(cases).index("symmetric float32"), len(cases)
    np.testing.assert_array_equal(found[f"logits.{both[0]}"], found[f"logits.{both[1]}"])


def test_codes_derived_again_from_the_values_fail_the_gate(tmp_path, monkeypatch):
    """What a converter does that gets floats: 2 bits by absmax instead of the trained codes."""
    params, packed = quantized(LLAMA, every(SEQ(levels=4)))
    faithful = export.write_hf

    def again(folder, decoder, params, *, packed, **options):
        params, packed = quantized(decoder, every(Symmetric(bits=2)), params)
        return faithful(folder, decoder, params, packed=packed, **options)

    monkeypatch.setattr(export, "write_hf", again)
    with pytest.raises(Rejected, match=r"reload: parameters .*7 differ"):
        export_hf(LLAMA, params, tmp_path / "hf", packed=packed)
    record = json.loads((tmp_path / "hf.failed" / MARK).read_text())
    logits = next(check for check in record["checks"] if check["name"] == "reload: logits")
    assert not logits["passed"]
    assert float(logits["found"].split()[1].rstrip(",")) > 1000 * float(logits["expected"].split()[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_round_the_other_weights_and_no_quantized_one(tmp_path, dtype):
    """The parameters in memory stay as they were, too."""
    params, packed = quantized(LLAMA, every(Symmetric(bits=8, scale_type=dtype)))
    before = {path: np.array(x) for path, x in flatten(params).items()}
    made = export_hf(LLAMA, params, tmp_path / "hf", dtype=dtype, packed=packed)
    assert [check.passed for check in made.checks] == [True, True, True, None]
    back = flatten(import_hf(tmp_path / "hf").params)
    assert all(np.array_equal(back[path], before[path]) == (path in packed) for path in before if "norm" not in path)
    assert all(np.array_equal(x, before[path]) for path, x in flatten(params).items())
    assert {x.dtype.name for x in Tensors(tmp_path / "hf").values()} == {dtype, "int32", "int64"}


def test_the_codes_of_a_loaded_model_are_exported(tmp_path):
    """What `slmjax export` does with a run."""
    params, packed = quantized(LLAMA, every(Balanced()))
    loaded = Loaded(decoder=LLAMA, weights=with_codes(params, packed), tokenizer_path=None, source=tmp_path, config={})
    write(Export(out=tmp_path / "hf"), loaded)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["strategy"], len(group["targets"])) == (3, "channel", 7)
    assert config["ignore"] == [r"re:(.*\.)?embed_tokens$", r"re:(.*\.)?lm_head$"]


NEOX = gpt_neox(layers=2, width=32, heads=4, hidden=48, vocab=97, context=64)
PHI = phi3(
    Sizes(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=97, context=64), position=Rope(fraction=0.75)
)
FUSED = {"query_key_value": NEOX, "qkv_proj": PHI}


@pytest.mark.parametrize("quantizer", [LSQ(granularity=PerTensor()), SEQ(granularity=PerGroup(size=8))], ids=["4", "2"])
@pytest.mark.parametrize("name", FUSED)
def test_queries_keys_and_values_in_one_tensor(tmp_path, name, quantizer):
    """Scales move with the rows; three scales of whole matrices become one for each row. 8 channels are a head here."""
    params, packed = quantized(FUSED[name], every(quantizer))
    made = export_hf(FUSED[name], params, tmp_path / "hf", packed=packed)
    assert [check.passed for check in made.checks] == [True, True, True, None]
    assert any(key.endswith(f"{name}.weight_packed") for key in Tensors(tmp_path / "hf"))


REFUSED = {
    "transposed": (gpt2(layers=1, width=32, heads=4, vocab=97, context=32), [Rule(quantizer=BitNet())], {},
                   r"^transformer\.h\.0\.attn\.c_attn\.weight is quantized, but .*transposed.*export GGUF"),
    "embedding": (llama(**SIZES), [Rule(quantizer=Symmetric(), patterns=("embed/table",))], {},
                  r"^embed/table is quantized, but stock .* packed embedding: leave it out .* or export GGUF"),
    "zero points of 8 bits": (LLAMA, [Rule(quantizer=Asymmetric(bits=8))], {},
                              r"q_proj has 256 levels and zero points, which take 9 bits.*or without zero points"),
    "bfloat16": (LLAMA, [Rule(quantizer=Symmetric())], {"dtype": "bfloat16"},
                 r"q_proj: its scales are not exact in bfloat16.*--dtype float32 or float16, or train with scale_type"),
    "float32 scales": (LLAMA, [Rule(quantizer=Symmetric(scale_type="float32"))], {"dtype": "float16"},
                       r"q_proj: its scales are not exact in float16, .*use --dtype float32, or train"),
    "levels": (LLAMA, [Rule(quantizer=SEQ(levels=256))], {}, r"q_proj has 256 levels .*9 bits.*with fewer levels"),
    "halves": (NEOX, [Rule(quantizer=Symmetric(), patterns=("layers/attn/q",))], {},
               r"query_key_value\.weight holds parameters .* one rule cover them all"),
    "folded": (dataclasses.replace(NEOX, embed_scale=3.0), [Rule(quantizer=BitNet(), patterns=("embed/table",))], {},
               r"^embed/table is quantized, and embed_scale = 3 would be multiplied"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_hold_is_refused_in_one_line(tmp_path, name):
    decoder, rules, options, message = REFUSED[name]
    params, packed = quantized(decoder, rules)
    with pytest.raises(UserError, match=message) as error:
        export_hf(decoder, params, tmp_path / "hf", packed=packed, **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def change(config, path, value):
    *parents, last = path.split(".")
    for name in parents:
        config = config[name]
    config[last] = value


UNREAD = {
    "quant_method": ("awq", "quant_method = 'awq' cannot be imported; only compressed-tensors"),
    "format": ("marlin-24", "quantization_config.format = 'marlin-24'"),
    "kv_cache_scheme": ({"num_bits": 8}, "kv_cache_scheme is set"),
    "config_groups": ({}, "config_groups is not a dictionary of groups"),
    "config_groups.group_0.input_activations": ({"num_bits": 8}, "group_0.input_activations is set"),
    "config_groups.group_0.weights": (None, "group_0.weights is missing"),
    "config_groups.group_0.weights.type": ("float", "weights.type = 'float'"),
    "config_groups.group_0.weights.num_bits": (9, "weights.num_bits = '9'"),
    "config_groups.group_0.weights.strategy": ("block", "weights.strategy = 'block'"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    params, packed = quantized(LLAMA, every(Symmetric(bits=3, granularity=PerGroup(size=32))))
    write_hf(path, LLAMA, params, packed=packed)
    tensors = load_file(path / "model.safetensors")
    for key in [key for key in tensors if key.endswith("weight_packed")]:
        shape, scale = (tensors[key.replace("packed", name)] for name in ("shape", "scale"))
        made = with_zero_points(unpack_codes(tensors[key], 3, int(shape[1])), scale)
        tensors |= {key.replace("weight_packed", name): x for name, x in made.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"], "config_groups.group_0.weights.symmetric", False)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_zero_points_are_read(folder):
    tensors, ours = load_file(folder / "model.safetensors"), import_hf(folder).params["layers"]["attn"]["q"]
    matrix = {x: tensors[f"{Q}.weight_{x}"] for x in ("packed", "scale", "zero_point")}
    zeros = unpack_codes(matrix["zero_point"].T, 3, 64).T.astype(np.float32)
    codes = unpack_codes(matrix["packed"], 3, 64).astype(np.float32)
    expected = (codes - zeros.repeat(32, axis=1)) * matrix["scale"].repeat(32, axis=1)
    np.testing.assert_array_equal(ours[1].reshape(64, 64).T, expected)


@pytest.mark.parametrize("field", UNREAD)
def test_other_quantization_is_not_imported(tmp_path, folder, field):
    value, message = UNREAD[field]
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"], field, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message) as error:
        import_hf(tmp_path)
    assert "\n" not in str(error.value)


Q = "model.layers.1.self_attn.q_proj"
DAMAGED = {
    "no scale": ({f"{Q}.weight_scale": None}, "weight_scale is missing"),
    "no shape": ({f"{Q}.weight_shape": None}, "weight_shape is missing"),
    "another shape": ({f"{Q}.weight_shape": np.array([64, 2**40])}, "is not a matrix"),
    "a negative shape": ({f"{Q}.weight_shape": np.array([-64, 64])}, "expected the two dimensions"),
    "gaps between codes": ({f"{Q}.weight_packed": np.zeros((64, 7), np.int32)}, "before 0.17 packs"),
    "no zero points": (
        {f"{Q}.weight_zero_point": None},
        "without weight_zero_point is not a matrix .* with zero points",
    ),
    "floats": ({f"{Q}.weight_packed": np.zeros((64, 6), np.float32)}, "weight_packed is F32; expected I32"),
    "scales of others": ({f"{Q}.weight_scale": np.ones((64, 3), np.float32)}, "weight_scale has shape"),
    "zero points of others": ({f"{Q}.weight_zero_point": np.zeros((5, 2), np.int32)}, "weight_zero_point has shape"),
    "a scale not finite": ({f"{Q}.weight_scale": np.full((64, 2), np.nan, np.float32)}, "NaN or Inf"),
    "twice": ({f"{Q}.weight": np.zeros((64, 64), np.float32)}, "both packed and as floats"),
    "a group of columns": ({f"{Q}.weight_g_idx": np.zeros(64, np.int32)}, "no place in this decoder"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(tmp_path, folder, name):
    changes, message = DAMAGED[name]
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({key: x for key, x in tensors.items() if x is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(StorageError, match=message) as error:
        import_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_python_without_compressed_tensors_is_a_mistake_of_the_user(tmp_path):
    params, packed = quantized(LLAMA, every(Symmetric()))
    with pytest.raises(UserError, match="it needs torch and transformers, and compressed-tensors"):
        export_hf(LLAMA, params, tmp_path / "hf", packed=packed, reference_python=sys.executable)
