"""Post-training quantization against small references, and its verb on a trained model."""

import functools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import slmjax

from slmjax import tree
from slmjax.compress.ptq.gptq import factor, gptq
from slmjax.compress.ptq.rtn import least_error, nearest, usual
from slmjax.compress.quant.activations import RoundedInputs
from slmjax.compress.quant.bits import pack_bits, unpack_bits
from slmjax.compress.quant.blocks import Blocks, PerChannel, PerGroup
from slmjax.compress.quant.grids import decoded
from slmjax.compress.quant.learned import Balanced
from slmjax.compress.quant.uniform import Asymmetric, Symmetric
from slmjax.data.build import build
from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.tokenizer import Bytes, File
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics
from slmjax.runs.calibrating import grams, with_static_scales
from slmjax.runs.loading import load
from slmjax.types import Batch

RNG = np.random.default_rng


def inputs(n=512, width=24, seed=0):
    """Correlated inputs [n, width], some of them large."""
    mix = RNG(seed).normal(size=(width, width)) * np.geomspace(3, 0.1, width)
    return RNG(seed + 1).normal(size=(n, width)) @ mix


def reference_gptq(w, gram, step, low, high):
    """Optimal brain quantization, column by column, as the textbook has it: the inverse Hessian is updated by Gaussian
    elimination after each column (no Cholesky factor, no blocks). Scales are given, one a row."""
    h = np.array(gram, np.float64)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    w, inverse = np.array(w, np.float64), np.linalg.inv(h)
    out = np.empty_like(w)
    for i in range(w.shape[1]):
        out[:, i] = step * np.clip(np.round(w[:, i] / step), low, high)
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.fast
@pytest.mark.parametrize("columns", [24, 200])
def test_gptq_is_optimal_brain_quantization(columns):
    x, w = inputs(width=columns), RNG(3).normal(size=(16, columns)) * 0.1
    quantizer = Symmetric(bits=3, scale_type="float32")
    codes, steps, zeros = gptq(quantizer, w, x.T @ x, None, usual)
    assert zeros is None
    np.testing.assert_allclose(steps[:, 0], np.abs(w).max(axis=1) / 3, rtol=1e-6)
    wanted = reference_gptq(w, x.T @ x, steps[:, 0].astype(np.float64), -4, 3)
    same = np.mean(steps * codes == np.asarray(wanted, np.float32))
    assert same > 0.99  # float32 values meet a float64 reference: a near tie may fall to either side
    np.testing.assert_allclose(steps * codes, wanted, atol=float(steps.max()) * 1.01)


def test_scales_of_groups_that_straddle_blocks():
    """Against a loop over columns in float64: a scale is that of its group as it is when its first column is reached,
    with the errors of this block of 128 columns in the columns of this block only."""
    x, w = inputs(width=192), RNG(3).normal(size=(8, 192)) * 0.1
    codes, steps, _ = gptq(Symmetric(bits=3, scale_type="float32"), w, x.T @ x, 48, usual)
    upper, scales = factor(x.T @ x)[0], []
    for first in (0, 128):
        last, errors = min(first + 128, 192), []
        for i in range(first, last):
            if i % 48 == 0:
                scales.append(np.abs(w[:, i : i + 48]).max(axis=1) / 3)
            value = scales[-1] * np.clip(np.round(w[:, i] / scales[-1]), -4, 3)
            errors.append((w[:, i] - value) / upper[i, i])
            w[:, i:last] -= errors[-1][:, None] * upper[i, i:last]
            w[:, i] = value
        w[:, last:] -= np.stack(errors, axis=1) @ upper[first:last, last:]
    np.testing.assert_allclose(steps, np.stack(scales, axis=1), rtol=1e-5)
    assert np.mean(np.isclose(np.repeat(steps, 48, axis=1) * codes, w, rtol=1e-5)) > 0.99


@pytest.mark.fast
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize(
    "quantizer", [Symmetric(bits=3), Asymmetric(bits=3), Balanced()], ids=lambda q: type(q).__name__
)
def test_gptq_loses_less_than_rounding(quantizer, group):
    """The error that counts is that of the outputs."""
    quantizer = replace(quantizer, granularity=PerChannel() if group is None else PerGroup(size=group))
    x, w = inputs(width=64), (RNG(4).normal(size=(32, 64)) * 0.1).astype(np.float32)
    codes, steps, zeros = gptq(quantizer, w, x.T @ x, group)
    spread = [1 if a is None else np.repeat(a, 64 // steps.shape[1], axis=1) for a in (steps, zeros)]
    ours = spread[0] * (codes - (0 if zeros is None else spread[1]) + quantizer.grid.offset)
    blocks = Blocks(w.shape, (32, 64 // (group or 64), group or 64), (2,))
    plain = {}
    for name, search in (("absmax", usual), ("mse", least_error)):
        plain[name] = decoded(nearest(quantizer, jnp.asarray(w), blocks, search), quantizer.grid, blocks)
    error = {name: np.square(x @ (a - w).T).sum() for name, a in {**plain, "gptq": ours}.items()}
    assert error["gptq"] < 0.8 * min(error["absmax"], error["mse"])
    weight_error = {name: np.square(a - w).sum() for name, a in plain.items()}
    assert weight_error["mse"] <= weight_error["absmax"] * (1 + 1e-6)


@pytest.mark.fast
def test_inputs_that_are_always_zero_get_no_weight():
    x = inputs(width=16)
    x[:, 3] = 0
    codes, steps, _ = gptq(Symmetric(bits=4), RNG(0).normal(size=(4, 16)), x.T @ x, None)
    assert not codes[:, 3].any()
    assert np.isfinite(steps).all()


@pytest.mark.fast
@settings(deadline=None, max_examples=80)
@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_bits_round_trip(case):
    bits, values = case
    packed = pack_bits(np.array(values, np.int64), bits)
    assert packed.nbytes == math.ceil(len(values) * bits / 8)
    whole = sum(value << (bits * i) for i, value in enumerate(values))  # the definition: lowest bit first
    assert int.from_bytes(packed.tobytes(), "little") == whole
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@pytest.mark.fast
def test_gram_matrices_are_those_of_each_layers_inputs():
    """Against the residual stream that the model returns: queries, keys and values read its norm."""
    model = llama(layers=3, width=16, heads=2, kv_heads=1, hidden=24, vocab=32, context=8, tied=True)
    built = model.build(Compute())
    params = built.init(jax.random.key(0))
    tokens = RNG(0).integers(0, 32, (4, 8), dtype=np.int32)
    ones = np.ones((4, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), ones.shape).copy()
    segments = ones.copy()
    segments[3, 5:] = 0  # a row with padding, which does not count
    batch = Batch(tokens, tokens, ones.astype(np.float32), positions, segments)
    found = grams(model, params, [batch, batch])
    assert found.tokens == 2 * 3 * 8
    rows = (jnp.asarray(x[:3]) for x in (tokens, positions, ones))
    blocks = built.apply(params, *rows, collect=True).blocks
    gains = tree.flatten(params)
    name = next(path for path in gains if path.startswith("layers/") and "norm" in path and "scale" in path)
    for layer in range(3):
        x = np.asarray(blocks[layer], np.float64).reshape(-1, 16)
        normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(gains[name][layer])
        for path in ("layers/attn/q", "layers/attn/v"):
            np.testing.assert_allclose(found.of(path)[layer], 2 * normed.T @ normed, rtol=1e-4, atol=1e-4)
    assert found.of("layers/mlp/down").shape == (3, 24, 24)
    assert found.of("layers/attn/o").shape == (3, 16, 16)


@pytest.mark.fast
def test_fixed_scales_of_activations_are_those_of_the_largest_inputs():
    """Against the residual stream, and the rounded products against NumPy."""
    model = llama(layers=2, width=16, heads=2, kv_heads=1, hidden=24, vocab=32, context=8, tied=True)
    built = model.build(Compute())
    params = built.init(jax.random.key(1))
    tokens = RNG(1).integers(0, 32, (3, 8), dtype=np.int32)
    ones = np.ones((3, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), ones.shape).copy()
    segments = ones.copy()
    segments[2, 5:] = 0
    batches = [Batch(tokens, tokens, ones.astype(np.float32), positions, segments)] * 2
    asked = Numerics(product=RoundedInputs(bits=8, patterns=("layers/attn/*", "embed/table")))
    found = with_static_scales(model, params, batches, asked)
    assert found == replace(asked, product=replace(asked.product, scale=found.product.scale))
    largest = dict(found.product.scale.largest)
    assert set(largest) == {"embed/table", *(f"layers/attn/{name}" for name in "qkvo")}
    rows = [jnp.asarray(x[:2]) for x in (tokens, positions, ones)]
    flat = tree.flatten(params)

    @functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    def computed(numerics):
        run = model.build(Compute(), numerics)
        out = run.apply(params, *rows, collect=True)
        return out, run.unembed(params, out.hidden)

    (out, plain), (rounded_out, rounded) = computed(Numerics()), computed(found)
    normed = [
        x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * np.asarray(flat["layers/attn_norm/scale"][i])
        for i, x in enumerate(np.asarray(out.blocks[:-1], np.float64))
    ]
    np.testing.assert_allclose(largest["layers/attn/q"], np.abs(normed).max(), rtol=1e-5)
    np.testing.assert_allclose(largest["embed/table"], np.abs(out.hidden).max(), rtol=1e-5)
    step = largest["embed/table"] / 127
    hidden = np.clip(np.round(np.asarray(rounded_out.hidden) / step), -128, 127) * step
    np.testing.assert_allclose(rounded, hidden @ np.asarray(flat["embed/table"]).T, atol=1e-5)
    assert 0 < np.abs(rounded - plain).max() < 0.05 * np.abs(plain).max()
    for wrong, message in (
        (Numerics(), "numerics.product is Product"),
        (Numerics(product=RoundedInputs(patterns=("layers/ssm/*",))), "match no product"),
    ):
        with pytest.raises(UserError, match=message):
            with_static_scales(model, params, batches, wrong)
    with pytest.raises(UserError, match="every row of the calibration data has padding"):
        with_static_scales(model, params, [jax.tree.map(lambda x: x[2:], batches[0])], asked)


@pytest.fixture(scope="module")
def quantized(tiny_run, tmp_path_factory):
    def make(*options):
        out = tmp_path_factory.mktemp("quantized") / "model"
        done = slmjax("quantize", tiny_run, "--out", out, "--batches", 2, *options)
        assert done.code == 0, done.err
        return out, done.out

    return make


def test_the_verb_writes_codes_that_every_verb_reads(quantized, tiny_run):
    out, said = quantized("--bits", 4, "--group", 16, "--embeddings", 8)
    assert "loss" in said
    assert "before" in said
    loaded, original = load(out), load(tiny_run)
    params, flat = tree.flatten(loaded.params), tree.flatten(original.params)
    assert set(loaded.packed) == {p for p in flat if p.startswith("layers/") and flat[p].ndim > 2} | {"embed/table"}
    for path, x in flat.items():
        if path in loaded.packed:
            np.testing.assert_array_equal(params[path], loaded.packed[path].values())
            assert 0 < np.abs(np.asarray(params[path]) - x).max() < 0.35 * np.abs(x).max()
        else:
            np.testing.assert_array_equal(params[path], x)
    file = out / "weights.safetensors"
    matrices = sum(math.prod(p.blocks.shape) for path, p in loaded.packed.items() if path != "embed/table")
    table = loaded.packed["embed/table"]
    others = sum(x.size for path, x in flat.items() if path not in loaded.packed)
    expected = matrices * 4 // 8 + matrices // 16 * 2 + math.prod(table.blocks.shape) + len(flat["embed/table"]) * 2
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + expected + others * 4
    for verb in (["generate", out, "--prompt", "The", "--max-tokens", 3], ["inspect", out]):
        assert slmjax(*verb).code == 0


def test_methods_and_grids(quantized):
    lost = {}
    for options in (
        ["--method", "rtn", "--bits", 2, "--group", 16],
        ["--method", "awq", "--bits", 2, "--group", 16],
        ["--method", "rtn-mse", "--bits", 2, "--grid", "balanced"],
        ["--bits", 3, "--grid", "asymmetric"],
        ["--method", "rtn", "--bits", 4, "--grid", "mxfp4"],
        ["--method", "rtn", "--bits", 4, "--grid", "nvfp4"],
    ):
        out, said = quantized(*options)
        if options[-1] in ("mxfp4", "nvfp4"):  # 4 and 8 / 32; 4, 8 / 16 and 32 for each of 7 parameters
            assert f"rounded to {'4.25' if options[-1] == 'mxfp4' else '4.51'} bits each" in said
        config = json.loads((out / "config.json").read_text())
        assert config["quantized"]["bits"] == options[options.index("--bits") + 1]
        assert load(out).packed
        lost[tuple(options)] = float(said.split(" after: ")[1].split()[0])
    nearest, scaled = list(lost.values())[:2]
    assert scaled < nearest - 5e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 9], "--bits is 9; expected 2 to 8"),
        (["--embeddings", 1], "--embeddings is 1; expected 2 to 8"),
        (["--bits", 4, "--grid", "balanced"], "--grid balanced has 2 bits"),
        (["--grid", "nvfp4", "--group", 16], "--grid nvfp4 has 4 bits and groups of its own, but --group is 16"),
        (["--group", 0], "--group is 0"),
        (["--group", 7], "which does not divide"),
        (["--batches", 0], "--batches is 0"),
        (["--length", 0], "--length is 0"),
        (["--length", 65], "longer than the model's context 64"),
    ],
)
def test_mistakes(tiny_run, tmp_path, options, message):
    done = slmjax("quantize", tiny_run, "--out", tmp_path / "out", *options)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_calibration_data_that_do_not_fit(tiny, tiny_run, tmp_path):
    """Too little text for one sequence, and text of another tokenizer (a mistake in data: exit code 4)."""
    text = JSONL(name="short", path=str(tmp_path / "short.jsonl"), licence="x")
    (tmp_path / "short.jsonl").write_text(
        "".join(f'{{"text": "{words}"}}\n' for words in ("Call me Ishmael.", "Loomings."))
    )
    for tokenizer, code, message in (
        (File(path=str(tiny_run)), 2, "every row of the calibration data has padding; give --length"),
        (Bytes(), 4, "was written by another tokenizer"),
    ):
        store = tmp_path / type(tokenizer).__name__
        build(Recipe(name="short", sources=(text,), tokenizer=tokenizer, validation=0.5), store, workers=1)
        done = slmjax("quantize", tiny_run, "--out", tmp_path / "out", "--data", store, "--batches", 1)
        assert done.code == code
        assert message in done.err
        assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(quantized, tmp_path):
    out, _ = quantized("--method", "rtn")
    done = slmjax("quantize", out, "--out", tmp_path / "again", "--method", "rtn")
    assert done.code == 2
    assert "is quantized already" in done.err
