"""The decoder against its own definition: what it may see, and that no way of computing it changes the result."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import (
    DECODERS,
    LENGTH,
    VOCAB,
    batch,
    columns,
    logits,
    parameters,
    steps,
    tiny_gpt2,
    tiny_llama,
    tiny_pattern,
)

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Attention
from slmjax.nn.attention_kernels import cudnn_attention, xla_attention
from slmjax.nn.compute import Compute, Remat, cpu_dtype, for_backend
from slmjax.nn.initial import Normal
from slmjax.nn.mlp import MLP, gelu
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.position import Learned, NoPosition, Rope
from slmjax.nn.processor import processor
from slmjax.nn.rope_scaling import Llama3Scaling
from slmjax.objectives import NextToken
from slmjax.platform import jaxlib_version
from slmjax.tree import flatten

pytestmark = pytest.mark.fast

BLOCK = {
    "attn/k": (32, 2, 8),
    "attn/o": (4, 8, 32),
    "attn/q": (32, 4, 8),
    "attn/v": (32, 2, 8),
    "attn_norm/scale": (32,),
    "mlp/down": (48, 32),
    "mlp/gate": (32, 48),
    "mlp/up": (32, 48),
    "mlp_norm/scale": (32,),
}
GPT2_BLOCK = {
    "attn/k": (32, 4, 8),
    "attn/k_bias": (4, 8),
    "attn/o": (4, 8, 32),
    "attn/o_bias": (32,),
    "attn/q": (32, 4, 8),
    "attn/q_bias": (4, 8),
    "attn/v": (32, 4, 8),
    "attn/v_bias": (4, 8),
    "attn_norm/bias": (32,),
    "attn_norm/scale": (32,),
    "mlp/down": (128, 32),
    "mlp/down_bias": (32,),
    "mlp/up": (32, 128),
    "mlp/up_bias": (128,),
    "mlp_norm/bias": (32,),
    "mlp_norm/scale": (32,),
}
LLAMA = {"embed/table": (VOCAB, 32), "final_norm/scale": (32,), **{f"layers/{k}": (3, *v) for k, v in BLOCK.items()}}
GOLDEN = {
    "llama": LLAMA,
    "untied": {**LLAMA, "unembed/table": (VOCAB, 32)},
    "gpt2": {
        "embed/positions": (64, 32),
        "embed/table": (VOCAB, 32),
        "final_norm/bias": (32,),
        "final_norm/scale": (32,),
        **{f"layers/{k}": (3, *v) for k, v in GPT2_BLOCK.items()},
    },
    "pattern": {
        "embed/table": (VOCAB, 32),
        "final_norm/scale": (32,),
        **{f"layers/{i}/{k}": (2, *v) for i in range(2) for k, v in BLOCK.items()},
    },
}
AXES = {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "layers", "context", None}


@pytest.fixture(params=DECODERS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def decoder(name):
    return DECODERS[name]


@pytest.fixture(scope="module")
def model(decoder):
    return decoder.build()


@pytest.fixture(scope="module")
def params(decoder, model):
    return parameters(decoder, model)


def test_parameter_paths_are_golden(name, decoder, model):
    """Checkpoints and conversion tables name these paths: a change here breaks every file already written."""
    made = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    assert {path: x.shape for path, x in made.items()} == GOLDEN[name]
    assert {x.dtype for x in made.values()} == {jnp.dtype("float32")}
    assert set(decoder.paths()) == set(GOLDEN[name])


def test_axes_name_every_dimension(name, model):
    axes = flatten(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    assert {path: len(a) for path, a in axes.items()} == {path: len(shape) for path, shape in GOLDEN[name].items()}
    assert {a for names in axes.values() for a in names} <= AXES
    sizes = {}
    for path, names in axes.items():
        for axis, size in zip(names, GOLDEN[name][path], strict=True):
            sizes.setdefault(axis, set()).add(size)
    assert all(len(found) == 1 for found in sizes.values()), sizes


def test_initial_values(decoder, model):
    """std 0.02, what writes to the residual stream 0.02 / sqrt(2L), gains 1, biases 0; and `declared` says so."""
    wide = replace(decoder, vocab=4096)
    made, declared = jax.jit(wide.build().init)(jax.random.key(3)), wide.declared()
    residual = 0.02 / np.sqrt(2 * wide.layers)
    std = {path: float(jnp.std(x)) for path, x in flatten(made).items()}
    words = flatten(jax.tree.map(lambda d: d.initial, declared, is_leaf=lambda d: hasattr(d, "initial")))
    for path, x in flatten(made).items():
        if path.endswith(("/scale", "bias")):
            assert jnp.all(x == (1.0 if path.endswith("/scale") else 0.0))
            assert words[path] == ("ones" if path.endswith("/scale") else "zeros")
        else:
            expected = residual if path.endswith(("attn/o", "mlp/down")) else 0.02
            assert std[path] == pytest.approx(expected, rel=0.1), path
            assert words[path] == f"normal({expected:.4g})"
    layers = [x for path, x in flatten(made).items() if path.endswith("attn/q")]
    assert all(not jnp.array_equal(x[0], x[1]) for x in layers)


@pytest.mark.parametrize("documents", [1, 3])
def test_no_gradient_reaches_what_must_not_be_seen(decoder, model, params, documents):
    """d logits_t / d embedding of token s is exactly 0 unless s <= t and both are of one document."""
    b = batch(rows=1, documents=documents)
    distinct = b._replace(tokens=jnp.arange(LENGTH)[None])  # token s is row s of the table, so rows stand for tokens

    def hidden(table):
        p = {**params, "embed": {**params["embed"], "table": table}}
        return model.apply(p, distinct.tokens, distinct.positions, distinct.segment_ids).hidden[0]

    jacobian = jax.jit(jax.jacrev(lambda table: hidden(table).sum(-1)))(params["embed"]["table"])  # [T, V, D]
    seen = np.asarray(jnp.abs(jacobian).max(-1)[:, :LENGTH] > 0)
    t = np.arange(LENGTH)
    segment = np.asarray(b.segment_ids[0])
    assert np.array_equal(seen, (t[None] <= t[:, None]) & (segment[None] == segment[:, None]))


def test_a_document_gives_the_same_logits_wherever_it_is_packed(model, params):
    b = batch(rows=1, documents=3)
    third = LENGTH // 3
    packed = logits(model, params, b)[0].reshape(3, third, VOCAB)
    alone = b._replace(**{f: getattr(b, f).reshape(3, third) for f in ("tokens", "positions")})
    alone = alone._replace(segment_ids=jnp.ones((3, third), jnp.int32))
    np.testing.assert_allclose(packed, logits(model, params, alone), rtol=0, atol=1e-5)


WAYS = {
    "two layers at a time": (Compute(unroll=2), None),
    "no loop": (Compute(unroll=None), 7),
    "remat": (Compute(remat=Remat()), 7),
    "remat, matmuls kept": (Compute(remat=Remat(keep_matmuls=True)), None),
    "remat, no loop": (Compute(remat=Remat(), unroll=None), None),
    "xla attention": (Compute(attention=xla_attention), LENGTH),
    "cudnn attention off its device": (Compute(attention=cudnn_attention), 1),
}


def _loss(decoder, compute=Compute(), chunk=None):  # noqa: B008
    objective, b = NextToken(z_loss=1e-3, chunk=chunk).build(decoder.build(compute)), batch(documents=2)
    return lambda p: objective.loss(p, (), b, jax.random.key(0))[0]


@pytest.fixture(params=["gpt2", "pattern"], scope="module")
def reference_step(request):
    decoder = DECODERS[request.param]
    params = parameters(decoder, decoder.build())
    return decoder, params, jax.jit(jax.value_and_grad(_loss(decoder)))(params)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_computing_gives_the_same_loss_and_gradient(reference_step, way):
    """Scan or not, remat or not, loss in chunks or whole, any attention."""
    decoder, params, (expected, expected_gradient) = reference_step
    value, gradient = jax.jit(jax.value_and_grad(_loss(decoder, *WAYS[way])))(params)
    assert value == pytest.approx(float(expected), rel=1e-6)
    for path, g in flatten(gradient).items():
        exact = flatten(expected_gradient)[path]
        assert jnp.abs(g - exact).max() <= 1e-5 * max(1.0, float(jnp.abs(exact).max())), path


def test_unrolling_all_layers_leaves_no_loop(decoder, params):
    lowered = {u: jax.jit(jax.grad(_loss(decoder, Compute(unroll=u)))).lower(params) for u in (1, None)}
    assert "stablehlo.while" in lowered[1].as_text()
    assert "stablehlo.while" not in lowered[None].as_text()


def test_remat_keeps_less(decoder, params):
    def saved(remat):
        _, backward = jax.eval_shape(lambda p: jax.vjp(_loss(decoder, Compute(remat=remat)), p), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    everything, matmuls, inputs = saved(Compute().remat), saved(Remat(keep_matmuls=True)), saved(Remat())
    assert inputs < matmuls < everything


def test_bfloat16_is_close_to_float32(decoder, model):
    b, params = batch(documents=2), parameters(decoder, model, scale=0.1)
    coarse = decoder.build(Compute(dtype="bfloat16"))
    assert coarse.apply(params, b.tokens, b.positions, b.segment_ids).hidden.dtype == jnp.bfloat16
    exact, rounded = logits(model, params, b), logits(coarse, params, b)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.std(rounded - exact)) <= 2e-2 * float(jnp.std(exact))
    gradient = jax.eval_shape(jax.grad(_loss(decoder, Compute(dtype="bfloat16"))), params)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_for_backend_is_a_value_for_every_backend():
    assert for_backend("gpu").dtype == for_backend("tpu").dtype == "bfloat16"
    assert for_backend("cpu").dtype == cpu_dtype(processor().bfloat16, jaxlib_version())
    assert for_backend("gpu").attention is cudnn_attention
    assert for_backend("gpu").micro_tokens(512) is for_backend("tpu").micro_tokens(512) is None
    assert [for_backend("cpu").micro_tokens(width) for width in (256, 512, 3 * 2**17)] == [1024, 512, 1]


def test_collect_returns_the_residual_stream(decoder, model, params):
    b = batch()
    plain = model.apply(params, b.tokens, b.positions, b.segment_ids)
    out = model.apply(params, b.tokens, b.positions, b.segment_ids, collect=True)
    assert plain.blocks is None
    assert out.blocks.shape == (decoder.layers + 1, 2, LENGTH, decoder.width)
    # The compiler fuses the two in different ways, so they round differently; one operation at a time, they are equal.
    with jax.disable_jit():
        one, other = (
            model.apply(params, b.tokens, b.positions, b.segment_ids, collect=collect).hidden
            for collect in (False, True)
        )
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(out.hidden, plain.hidden, rtol=0, atol=2e-5)
    np.testing.assert_allclose(_normed(decoder, params["final_norm"], out.blocks[-1]), out.hidden, atol=1e-5)
    # Stopping after the first n repeats of the pattern must give the stream that was collected there.
    n = len(decoder.pattern)
    short = replace(decoder, repeats=1)
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    again = short.build().apply(first, b.tokens, b.positions, b.segment_ids, collect=True)
    np.testing.assert_allclose(out.blocks[: n + 1], again.blocks, rtol=0, atol=1e-6)
    assert all(jnp.abs(out.blocks[i + 1] - out.blocks[i]).max() > 1e-3 for i in range(decoder.layers))


def _normed(decoder, p, x):
    x = np.asarray(x, np.float64)
    if isinstance(decoder.final_norm, LayerNorm):
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + decoder.final_norm.eps) * np.asarray(p["scale"])
    return x + np.asarray(p["bias"]) if "bias" in p else x


@pytest.mark.parametrize("unroll", [1, None])
@pytest.mark.parametrize("prefill", [1, 9])
def test_prefill_and_decode_equal_the_full_forward(decoder, model, params, prefill, unroll):
    """Rows of unequal length, padded on the left; the cache has room to spare."""
    length, pad = 16, jnp.asarray([0, 3, 8])
    b = batch(rows=3, length=length)
    slots = jnp.arange(length)[None]
    real = slots >= pad[:, None]
    b = b._replace(positions=jnp.maximum(slots - pad[:, None], 0), segment_ids=real.astype(jnp.int32))
    full = logits(model, params, b)

    generator = decoder.build(Compute(unroll=unroll))
    step = steps(generator)
    cache, pieces = generator.init_cache(3, length + 5), []
    for start, stop in [(0, prefill)] + [(i, i + 1) for i in range(prefill, length)]:
        out, piece = step(params, cache, columns(b, start, stop))
        cache = out.cache
        pieces.append(piece)
    cached = jnp.concatenate(pieces, axis=1)
    error = jnp.abs(jnp.where(real[..., None], cached - full, 0)).max()
    assert error <= 1e-5 * max(1.0, float(jnp.abs(full).max()))
    assert int(cache.length) == length
    # A row padded on the left is that row alone.
    alone = jax.tree.map(lambda x: x[2:, 8:], b)
    np.testing.assert_allclose(full[2, 8:], logits(model, params, alone)[0], rtol=0, atol=2e-5)
    assert all(bool(jnp.isfinite(x).all()) for x in (full, cached))


def test_a_row_that_has_ended_can_go_on_as_padding(model, params):
    """Segment 0 fed after a row's end changes nothing for the others and stays finite."""
    b = batch(rows=2, length=6)
    cache = model.apply(params, b.tokens, b.positions, b.segment_ids, cache=model.init_cache(2, 8)).cache
    one = jnp.full((2, 1), 5, jnp.int32)
    both = model.apply(params, one, one + 1, jnp.ones_like(one), cache=cache).hidden
    ended = model.apply(params, one, one + 1, jnp.asarray([[1], [0]]), cache=cache).hidden
    np.testing.assert_allclose(both[0], ended[0], rtol=0, atol=1e-6)
    assert bool(jnp.isfinite(ended).all())
    assert jnp.abs(both[1] - ended[1]).max() > 1e-3


def _mixer(decoder, **changes):
    block = decoder.pattern[0]
    return replace(decoder, pattern=(replace(block, mixer=replace(block.mixer, **changes)),))


def _mlp(decoder, mlp):
    return replace(decoder, pattern=(replace(decoder.pattern[0], mlp=mlp),))


def _norm(decoder, norm):
    return replace(decoder, pattern=(replace(decoder.pattern[0], norm=norm),))


LLAMA_BASE, GPT2_BASE = tiny_llama(), tiny_gpt2()
FLIPS = {
    "rope theta": (LLAMA_BASE, tiny_llama(theta=1e5)),
    "rope scaling": (LLAMA_BASE, tiny_llama(scaling=Llama3Scaling(factor=8.0, original_context=64))),
    "no rope": (LLAMA_BASE, _mixer(LLAMA_BASE, position=NoPosition())),
    "attention scale": (LLAMA_BASE, _mixer(LLAMA_BASE, scale=1.0)),
    "qkv bias": (LLAMA_BASE, _mixer(LLAMA_BASE, qkv_bias=True)),
    "o bias": (LLAMA_BASE, _mixer(LLAMA_BASE, o_bias=True)),
    "mlp bias": (LLAMA_BASE, tiny_llama(mlp_bias=True)),
    "gated activation": (LLAMA_BASE, tiny_llama(activation=gelu)),
    "gate": (LLAMA_BASE, _mlp(LLAMA_BASE, MLP(hidden=48))),
    "norm eps": (LLAMA_BASE, tiny_llama(eps=1e-3)),
    "block norm": (LLAMA_BASE, _norm(LLAMA_BASE, LayerNorm(bias=False))),
    "final norm": (LLAMA_BASE, replace(LLAMA_BASE, final_norm=LayerNorm(bias=False))),
    "final norm bias": (LLAMA_BASE, replace(LLAMA_BASE, final_norm=LayerNorm(bias=True))),
    "tied": (LLAMA_BASE, tiny_llama(tied=False)),
    "learned positions": (LLAMA_BASE, replace(LLAMA_BASE, position=Learned())),
    "order of the pattern": (tiny_pattern(), replace(tiny_pattern(), pattern=tiny_pattern().pattern[::-1])),
    "gelu by erf": (GPT2_BASE, tiny_gpt2(activation=gelu)),
    "gpt2 attention scale": (GPT2_BASE, tiny_gpt2(scale=1.0)),
    "gpt2 norm eps": (GPT2_BASE, tiny_gpt2(eps=1e-3)),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_each_switch_moves_the_logits(flip):
    """A switch that is read nowhere would pass every comparison that leaves it at its default."""
    base, flipped = (_logits_of(decoder) for decoder in FLIPS[flip])
    assert jnp.abs(base - flipped).max() > 1e-3


def _logits_of(decoder):
    model = decoder.build()
    return logits(model, parameters(decoder, model, scale=1.0), batch())


def test_changes_of_position_alone_move_the_logits(model, params):
    b = batch()
    moved = b._replace(positions=b.positions[:, ::-1])
    assert jnp.abs(logits(model, params, b) - logits(model, params, moved)).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: tiny_llama(kv_heads=3), "kv_heads: 3"),
        (lambda: tiny_llama(head_dim=7), "head_dim: 7"),
        (lambda: tiny_llama(layers=0), "0 layers"),
        (lambda: replace(tiny_llama(), pattern=()), "model.pattern"),
        (lambda: Compute(dtype="float16"), "compute.dtype: 'float16'"),
        (lambda: Compute(micro_size=0), "compute.micro_size: 0"),
        (lambda: Compute(unroll=0), "compute.unroll: 0"),
        (lambda: NextToken(z_loss=-1.0), "objective.z_loss: -1.0"),
        (lambda: NextToken(chunk=0), "objective.chunk: 0"),
    ],
)
def test_mistakes_are_named(make, names):
    with pytest.raises(UserError, match=names):
        make()


def test_residual_factor_multiplies_the_depth_scale():
    decoder = replace(tiny_llama(), initial=Normal(std=0.1, residual=2.0))
    assert decoder.declared()["layers"]["attn"]["o"].initial == f"normal({0.1 * 2 / np.sqrt(6):.4g})"
    assert decoder.declared()["layers"]["attn"]["q"].initial == "normal(0.1)"


def test_parts_are_values():
    """Equal values are equal decoders: experiments are compared, hashed and written as such."""
    assert tiny_llama() == tiny_llama()
    assert hash(tiny_llama()) == hash(tiny_llama())
    assert tiny_llama() != tiny_llama(eps=1e-6)
    assert isinstance(tiny_llama(), Decoder)
    mixer = tiny_llama().pattern[0].mixer
    assert mixer == Attention(heads=4, kv_heads=2, head_dim=8, position=Rope(theta=1e4))
    assert tiny_llama().pattern[0].norm == RMSNorm(eps=1e-5)
