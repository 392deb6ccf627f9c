"""Packed weights of Hugging Face folders and GGUF files stay packed: the values of the floats, and the same bytes when
they are written again."""

import json
import pathlib
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from running import slmjax
from safetensors.numpy import load_file, save_file

from slmjax import tree
from slmjax.compress.quant.blocks import PerChannel, PerGroup, PerTensor
from slmjax.compress.quant.float4 import Float4
from slmjax.compress.quant.grids import Codes, Nearest
from slmjax.compress.quant.into_memory import packed_in
from slmjax.compress.quant.view import Packed
from slmjax.convert.gguf import layouts
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.convert.hf import abstract, import_hf, write_hf
from slmjax.convert.pack_quantized import pack_codes
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.models.families.common.llama_like import Sizes
from slmjax.models.families.llama import llama
from slmjax.models.families.phi3 import phi3
from slmjax.nn.position import Rope
from slmjax.runs.carrying import carried, gguf, hugging_face
from slmjax.runs.library import LoadedModel
from slmjax.runs.loading import load

QUICK = {"xla_backend_optimization_level": 0}
SIZES = {"layers": 1, "width": 256, "vocab": 270, "hidden": 256, "heads": 4, "kv_heads": 2, "context": 128}
LLAMA = llama(**SIZES, tied=False)
ATTENTION = {name: f"layers/attn/{name}" for name in "qkvo"}
GATE, UP, DOWN = ("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down")


def levels(low, high, offset=0.0):
    return Nearest(low=low, high=high, offset=offset)


GGUF_TYPES = {  # what is stored as Q8_0, Q4_0, Q3_K, TQ2_0 (mirrored), Q2_K, TQ1_0, Q4_K, Q5_0, Q1_0; then the others
    "first": {
        ATTENTION["q"]: (levels(-128, 127), PerGroup(size=32)),
        ATTENTION["k"]: (levels(-8, 7), PerGroup(size=64)),
        ATTENTION["v"]: (levels(-4, 3), PerChannel()),
        ATTENTION["o"]: (levels(-2, 1), PerGroup(size=256)),
        GATE: (levels(-2, 1, 0.5), PerChannel()),
        UP: (levels(-1, 1), PerTensor()),
        DOWN: (levels(0, 15), PerGroup(size=256)),
        "embed/table": (levels(-16, 15), PerGroup(size=64)),
        "unembed/table": (levels(-1, 0, 0.5), PerGroup(size=128)),
    },
    "second": {
        ATTENTION["q"]: (levels(-2, 1), PerGroup(size=64)),  # Q2_0
        ATTENTION["k"]: (levels(-32, 31), PerTensor()),  # Q6_K
        ATTENTION["v"]: (levels(0, 3), PerChannel()),  # Q2_K with zero points
        ATTENTION["o"]: (Float4(), PerGroup(size=32)),
        GATE: (Float4(), PerGroup(size=16)),
        UP: (levels(-8, 7, 0.5), PerChannel()),  # Q4_K
        DOWN: (levels(-128, 127), PerChannel()),
    },
}
HF_TYPES = {
    ATTENTION["q"]: (levels(-2, 1), PerChannel()),
    ATTENTION["k"]: (levels(-4, 3), PerGroup(size=32)),
    ATTENTION["v"]: (levels(-8, 7), PerTensor()),
    ATTENTION["o"]: (levels(-16, 15), PerGroup(size=64)),  # as wide as a head
    GATE: (levels(-32, 31), PerChannel()),
    UP: (levels(-64, 63), PerGroup(size=16)),
    DOWN: (levels(-128, 127), PerChannel()),
    "unembed/table": (levels(-1, 0), PerChannel()),
}


def tokenizer():
    made = Bytes().make([], pathlib.Path())
    return Tokenizer(made.raw, bos=made.bos, eos=made.eos)


def steps_for(grid, granularity, shape, rng):
    if not isinstance(grid, Float4):
        return rng.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    if granularity.size == 32:
        return np.ldexp(np.float32(1), rng.integers(-9, -3, shape))
    return rng.integers(8, 16, shape).astype(np.float32) * np.float32(2.0**-11)  # E4M3 times a power of two


def drawn(model, kinds, seed=0):
    """(parameters with the values of codes, the codes), at random."""
    rng, params, packed = np.random.default_rng(seed), {}, {}
    axes = tree.flatten(model.axes(), is_leaf=tree.is_axes)
    for path, x in tree.flatten(abstract(model)).items():
        if path not in kinds:
            params[path] = rng.normal(size=x.shape).astype(np.float32)
            continue
        grid, granularity = kinds[path]
        blocks = granularity.cut(x.shape, axes[path], path)
        codes = rng.choice(np.array(grid.codes, np.int16), x.shape)
        steps = steps_for(grid, granularity, blocks.scales, rng)
        zeros = rng.integers(0, grid.high + 1, blocks.scales).astype(np.int16) if grid.low == 0 else None
        packed[path] = Packed(Codes(codes, steps, zeros), grid, blocks, axes[path])
        params[path] = packed[path].values()
    return tree.unflatten(params), packed


def assert_same(packed, floats):
    """Codes in memory have the values of the floats, the sign of zero included."""
    for path, x in packed_in(packed).items():
        found, wanted = np.asarray(x.values()), np.asarray(tree.flatten(floats)[path])
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), path)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_gguf_types_stay_packed_and_are_written_again_byte_for_byte(tmp_path, name):
    params, packed = drawn(LLAMA, GGUF_TYPES[name])
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(first, LLAMA, params, tokenizer=tokenizer(), packed=packed)
    kept = import_gguf(first, packed=True).params
    assert set(packed_in(kept)) == set(packed)
    assert_same(kept, params)
    assert tree.nbytes(kept["layers"]) < 0.2 * tree.nbytes(params["layers"])
    write_gguf(second, LLAMA, params, tokenizer=tokenizer(), packed=packed_in(kept))
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (HF_TYPES, "float32"),
        ({UP: (Float4(), PerGroup(size=32)), DOWN: (Float4(), PerGroup(size=16))}, "bfloat16"),
    ],
)
def test_folders_of_compressed_tensors_stay_packed_and_are_written_again_alike(tmp_path, kinds, dtype):
    params, packed = drawn(LLAMA, kinds)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_hf(tmp_path / "a", LLAMA, params, packed=packed, dtype=dtype)
    kept = import_hf(tmp_path / "a", packed=True).params
    assert set(packed_in(kept)) == set(packed)
    assert_same(kept, params)
    write_hf(tmp_path / "b", LLAMA, params, packed=packed_in(kept), dtype=dtype)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_parts_of_one_tensor_stay_packed(tmp_path):
    """Phi-3 keeps queries, keys and values in one tensor, and so the two matrices of the gate."""
    sizes = Sizes(layers=1, width=64, vocab=97, hidden=96, heads=4, kv_heads=2, context=64, tied=False)
    model = phi3(sizes=sizes, position=Rope())
    each = {path: (levels(-8, 7), PerGroup(size=32)) for path in (*ATTENTION.values(), GATE, UP)}
    params, packed = drawn(model, each)
    write_hf(tmp_path, model, params, packed=packed)
    kept = import_hf(tmp_path, packed=True).params
    assert set(packed_in(kept)) == set(each)
    assert_same(kept, params)


def test_zero_points_of_a_folder_that_another_tool_wrote(tmp_path):
    """The up projection of the second layer is not quantized: so that parameter, which has both layers, is floats."""
    model = llama(layers=2, width=64, vocab=97, hidden=96, heads=4, kv_heads=2, context=64)
    write_hf(tmp_path, model, drawn(model, {})[0])
    tensors, rng = load_file(tmp_path / "model.safetensors"), np.random.default_rng(1)
    for key in [key for key in tensors if ".mlp." in key and "1.mlp.up" not in key]:
        out, inputs = tensors.pop(key).shape
        module, scale = key.removesuffix(".weight"), rng.uniform(0.01, 0.1, (out, inputs // 32))
        zeros = np.ascontiguousarray(pack_codes(rng.integers(-8, 8, (inputs // 32, out)), 4).T)
        tensors |= {
            f"{module}.weight_packed": pack_codes(rng.integers(-8, 8, (out, inputs)), 4),
            f"{module}.weight_scale": scale.astype(ml_dtypes.bfloat16),
            f"{module}.weight_shape": np.array([out, inputs]),
            f"{module}.weight_zero_point": zeros,
        }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept, floats = import_hf(tmp_path, packed=True).params, import_hf(tmp_path).params
    assert set(packed_in(kept)) == {GATE, DOWN}
    assert_same(kept, floats)
    np.testing.assert_array_equal(kept["layers"]["mlp"]["up"], floats["layers"]["mlp"]["up"])


def rewritten(file, changes):
    """Puts other bytes into the blocks of tensors, {name: bytes [blocks, size] -> bytes}."""
    opened, data = GGUF(file), bytearray(file.read_bytes())
    for name, change in changes.items():
        info = opened.infos[name]
        raw = np.frombuffer(bytes(data[info.start : info.start + info.size]), np.uint8)
        new = change(raw.reshape(-1, layouts.FORMATS[info.kind].size).copy())
        data[info.start : info.start + info.size] = new.tobytes()
    file.write_bytes(bytes(data))


def test_what_llama_cpp_writes_and_slmjax_does_not(tmp_path):
    """Negative scales, scales of 16 weights, blocks of zeros; types that are no step times an integer become floats."""
    file, (params, packed) = (
        tmp_path / "a.gguf",
        drawn(LLAMA, GGUF_TYPES["first"] | {UP: (levels(-32, 31), PerTensor())}),
    )
    write_gguf(file, LLAMA, params, tokenizer=tokenizer(), packed=packed)
    rng = np.random.default_rng(2)

    def signs(raw):  # of d, in its last bit; and a block of zeros
        raw[:, 1] |= rng.integers(0, 2, len(raw), dtype=np.uint8) << 7
        raw[0, :2] = 0
        return raw

    def sub_scales(raw):
        raw[:, 192:208] = rng.integers(0, 256, (len(raw), 16))
        return raw

    def minima(raw):  # of Q4_K: dmin is not d
        raw[:, 2:4] = np.float16(0.03).reshape(1, 1).view(np.uint8)
        return raw

    both = {f"blk.{i}.attn_k.weight": signs for i in (0,)} | {f"blk.{i}.ffn_up.weight": sub_scales for i in (0,)}
    rewritten(file, both | {"blk.0.ffn_down.weight": minima})
    kept, floats = import_gguf(file, packed=True).params, import_gguf(file).params
    assert set(packed_in(kept)) == set(packed) - {DOWN}
    assert packed_in(kept)[ATTENTION["k"]].codes.steps.min() < 0
    assert packed_in(kept)[UP].blocks.group == 16
    assert_same(kept, floats)
    found, wanted = (x["layers"]["attn"]["k"] for x in (kept, floats))
    found = np.asarray(jax.jit(lambda x: x.values(), compiler_options=QUICK)(found))
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), "as programs decode them")
    np.testing.assert_array_equal(kept["layers"]["mlp"]["down"], floats["layers"]["mlp"]["down"])


def test_a_packed_file_runs_from_its_codes_and_is_imported_with_them(tmp_path):
    model = llama(layers=1, width=64, vocab=270, hidden=64, heads=4, kv_heads=2, context=64)
    kinds = {ATTENTION["q"]: (levels(-8, 7), PerGroup(size=32)), UP: (levels(-128, 127), PerGroup(size=32)),
             "embed/table": (levels(-8, 7), PerChannel())}  # fmt: skip
    params, packed = drawn(model, kinds)
    file = tmp_path / "a.gguf"
    write_gguf(file, model, params, tokenizer=tokenizer(), packed=packed)
    done = slmjax("import", file, "--out", tmp_path / "in")
    assert done.code == 0, done.err
    assert "of them stay packed" in done.out
    loaded = [load(file), load(tmp_path / "in")]
    for each in loaded:
        assert set(each.packed) == set(packed)
        assert each.foreign
        assert_same(each.weights, params)
    said = []
    assert set(carried(loaded[1], gguf, said.append)) == set(packed)
    assert not said
    assert set(carried(loaded[0], hugging_face("float32"), said.append)) == set(packed) - {"embed/table"}
    assert said[0].startswith("1 of 3 packed parameters are written as floats, first embed/table: ")
    ids = np.arange(40)
    mine, theirs = (LoadedModel(x).logits(ids) for x in (loaded[0], replace(loaded[0], weights=loaded[0].params)))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
