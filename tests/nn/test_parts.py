"""Each part against its formula, written independently in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.nn.attention import Attention
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import Mask, Scores, cudnn_attention, reference_attention, xla_attention
from slmjax.nn.compute import Compute, einsum
from slmjax.nn.initial import Normal
from slmjax.nn.layer import Layer
from slmjax.nn.mlp import MLP, GatedMLP, SwiGLU, gelu, gelu_tanh, relu, silu
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.parts import Flow
from slmjax.nn.position import NoPosition, Rope
from slmjax.nn.rope_scaling import Llama3Scaling

pytestmark = pytest.mark.fast

ERF = np.vectorize(__import__("math").erf)
ACTIVATIONS = {
    silu: lambda x: x / (1 + np.exp(-x)),
    gelu: lambda x: x * 0.5 * (1 + ERF(x / np.sqrt(2))),
    gelu_tanh: lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    relu: lambda x: np.maximum(x, 0),
}


def run(spec, params, *args, compute=Compute()):  # noqa: B008
    return Layer(spec=spec, compute=compute, initial=Normal()).apply({"params": params}, *args)


NOTHING = Flow(None, Mask.of_rows(jnp.ones((2, 3), jnp.int32)), None, jnp.int32(0), {}, {})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def f32(x):
    return jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms(dtype):
    x, scale, bias = 3 + 5 * normal(2, 3, 16), normal(16, seed=1), normal(16, seed=2)
    compute, tolerance = Compute(dtype=dtype), {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    rms = run(RMSNorm(eps=1e-2), f32({"scale": scale}), jnp.asarray(x, dtype), compute=compute)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale, atol=tolerance)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale
    plain = run(LayerNorm(eps=1e-2, bias=False), f32({"scale": scale}), jnp.asarray(x, dtype), compute=compute)
    np.testing.assert_allclose(plain, centred, atol=tolerance)
    biased = run(LayerNorm(eps=1e-2), f32({"scale": scale, "bias": bias}), jnp.asarray(x, dtype), compute=compute)
    np.testing.assert_allclose(biased, centred + bias, atol=tolerance)
    assert rms.dtype == plain.dtype == biased.dtype == dtype


def test_norm_reduces_in_float32():
    """A large common offset: in bfloat16 arithmetic the variance would be lost."""
    x = jnp.asarray(np.r_[np.full(8, 256.0), np.full(8, 258.0)], jnp.bfloat16)
    y = run(LayerNorm(eps=0.0, bias=False), f32({"scale": np.ones(16)}), x, compute=Compute(dtype="bfloat16"))
    np.testing.assert_allclose(y, np.r_[-np.ones(8), np.ones(8)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_mlps(activation):
    x = 3 * normal(2, 3, 4)
    exact = ACTIVATIONS[activation]
    np.testing.assert_allclose(activation(jnp.asarray(x, jnp.float32)), exact(x), rtol=1e-5, atol=1e-6)
    w = {"gate": normal(4, 6, seed=1), "up": normal(4, 6, seed=2), "down": normal(6, 4, seed=3)}
    b = {"gate_bias": normal(6, seed=4), "up_bias": normal(6, seed=5), "down_bias": normal(4, seed=6)}
    plain, _ = run(MLP(hidden=6, activation=activation), f32({k: w[k] for k in ("up", "down")}), f32(x), NOTHING)
    np.testing.assert_allclose(plain, exact(x @ w["up"]) @ w["down"], rtol=1e-4, atol=1e-4)
    gated, _ = run(GatedMLP(hidden=6, activation=activation, bias=True), f32({**w, **b}), f32(x), NOTHING)
    inner = exact(x @ w["gate"] + b["gate_bias"]) * (x @ w["up"] + b["up_bias"])
    np.testing.assert_allclose(gated, inner @ w["down"] + b["down_bias"], rtol=1e-4, atol=1e-3)


def test_swiglu_is_the_gated_mlp_with_silu():
    assert SwiGLU(hidden=6) == GatedMLP(hidden=6, activation=silu)


def complex_rope(x, positions, frequencies):
    """Rotate-half as multiplication of complex numbers: channel i with channel i + K/2."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None, None] * frequencies)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("head_dim", [8, 64, 96])
def test_rope_is_a_rotation_by_position(head_dim):
    rope, x = Rope(theta=5e5), normal(2, 5, 3, head_dim)
    positions = np.asarray([[0, 1, 2, 3, 4], [0, 0, 7, 100, 2047]])
    exact = complex_rope(x, positions, 5e5 ** (-np.arange(0, head_dim, 2) / head_dim))
    y = rope.rotate(f32(x), rope.table(jnp.asarray(positions), head_dim))
    np.testing.assert_allclose(y, exact, atol=1e-3)  # float32 angles: 2047 * 2^-24
    np.testing.assert_allclose(y[0], exact[0], atol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rope_sees_distances_only():
    rope, q, k = Rope(), f32(normal(1, 1, 1, 16)), f32(normal(1, 1, 1, 16, seed=1))

    def score(i, j):
        at = [rope.table(jnp.asarray([[p]]), 16) for p in (i, j)]
        return float(jnp.sum(rope.rotate(q, at[0]) * rope.rotate(k, at[1])))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(4, 9)) > 1e-3


def test_rope_of_bfloat16_turns_in_float32():
    """bfloat16 has no 257: computed in it, positions 256 and 257 would coincide."""
    rope, x = Rope(), jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    y = rope.rotate(x, rope.table(jnp.asarray([[256, 257]]), 8))
    assert y.dtype == jnp.bfloat16
    exact = complex_rope(np.ones((1, 2, 1, 8)), np.asarray([[256, 257]]), 1e4 ** (-np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-2)


def test_llama3_scaling_by_wavelength():
    """Fast rotations kept, slow ones divided, those between blended, all by the published formula."""
    frequencies = Rope(theta=5e5).frequencies(128)
    scaled = Rope(theta=5e5, scaling=Llama3Scaling(factor=32.0)).frequencies(128)
    kinds = set()
    for f, s in zip(frequencies.astype(np.float64), scaled, strict=True):
        wavelength = 2 * np.pi / f
        if wavelength < 8192 / 4:
            kind, expected = "kept", f
        elif wavelength > 8192 / 1:
            kind, expected = "divided", f / 32
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "blended", (1 - smooth) * f / 32 + smooth * f
        kinds.add(kind)
        assert s == pytest.approx(expected, rel=1e-6)
    assert kinds == {"kept", "divided", "blended"}


def test_no_position_leaves_queries_alone():
    x = f32(normal(1, 2, 3, 4))
    assert NoPosition().rotate(x, NoPosition().table(jnp.zeros((1, 2)), 4)) is x


SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]], np.int32)


def exact_attention(q, k, v, seen, scale):
    """One query, one head at a time."""
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        keys = np.flatnonzero(seen[b, t])
        scores = np.exp(scale * k[b, keys, g] @ q[b, t, h])
        out[b, t, h] = scores @ v[b, keys, g] / scores.sum()
    return out


@pytest.mark.parametrize("attention", [reference_attention, xla_attention, cudnn_attention])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_functions(attention, kv_heads):
    q, k, v = normal(2, 8, 4, 6), normal(2, 8, kv_heads, 6, seed=1), normal(2, 8, kv_heads, 6, seed=2)
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(8, dtype=bool)
    mask = Mask.of_rows(jnp.asarray(SEGMENTS))
    assert np.array_equal(mask.dense(Scores(scale=1.0)), seen)
    y = attention(f32(q), f32(k), f32(v), mask, Scores(scale=0.7))
    np.testing.assert_allclose(y, exact_attention(q, k, v, seen, 0.7), atol=2e-6)


@pytest.mark.parametrize("attention", [reference_attention, xla_attention, cudnn_attention])
def test_attention_with_a_cache_starts_at_its_slot(attention):
    """Queries 3 and 4 of 8 slots: later slots are empty and of segment 0."""
    q, k, v = normal(2, 2, 4, 6), normal(2, 8, 2, 6, seed=1), normal(2, 8, 2, 6, seed=2)
    keys = SEGMENTS.copy()
    keys[:, 5:] = 0
    queries = SEGMENTS[:, 3:5]
    slots = np.arange(8)[None, None]
    seen = (queries[:, :, None] == keys[:, None]) & (slots <= np.asarray([3, 4])[None, :, None])
    mask = Mask.of_cache(jnp.asarray(queries), jnp.asarray(keys), jnp.int32(3))
    assert np.array_equal(mask.dense(Scores(scale=1.0)), seen)
    y = attention(f32(q), f32(k), f32(v), mask, Scores(scale=1.0))
    np.testing.assert_allclose(y, exact_attention(q, k, v, seen, 1.0), atol=2e-6)


@pytest.mark.parametrize("attention", [reference_attention, xla_attention, cpu_attention])
def test_tokens_may_lie_in_any_order_that_their_slots_tell(attention):
    """As on a device that holds parts of each row: distances are those of the slots."""
    order = np.random.default_rng(0).permutation(8)
    q, k, v = (f32(normal(2, 8, 4, 6, seed=i)) for i in range(3))
    rule = Scores(scale=0.7, window=4, slopes=(0.5, 0.25, 0.125, 0.0625))
    whole = Mask.of_rows(jnp.asarray(SEGMENTS))
    segments = jnp.asarray(SEGMENTS[:, order])
    moved = Mask(segments, segments, jnp.asarray(order), jnp.asarray(order))

    def run(x, mask):
        y, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, rule), *x)
        return y, *pull(jnp.cos(y))

    for a, b in zip(run((q, k, v), whole), run([x[:, order] for x in (q, k, v)], moved), strict=True):
        np.testing.assert_allclose(a[:, order], b, atol=2e-6)


def test_every_contraction_with_a_parameter_goes_through_einsum():
    """Quantized or hand-written products replace one value, so none may go round it."""
    used = []

    def spy(equation, x, weight):
        used.append((equation, weight.shape))
        return einsum(equation, x, weight)

    compute, x = Compute(einsum=spy), jnp.ones((1, 2, 8))
    mixer = Attention(heads=2, kv_heads=1, head_dim=4, position=Rope())
    ids = jnp.ones((1, 2), jnp.int32)
    flow = Flow(mixer.table(ids), Mask.of_rows(ids), None, jnp.int32(0), {}, {})
    for spec in (mixer, GatedMLP(hidden=6), MLP(hidden=6)):
        module = Layer(spec=spec, compute=compute, initial=Normal())
        used.clear()
        params = module.init(jax.random.key(0), x, flow)["params"]
        shapes = sorted(p.value.shape for p in jax.tree.leaves(params, is_leaf=lambda p: hasattr(p, "value")))
        assert sorted(shape for _, shape in used) == shapes
