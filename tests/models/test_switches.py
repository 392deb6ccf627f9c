"""The switches with which one decoder covers every family: each against its formula, each way of computing the same."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import LENGTH, VOCAB, batch, columns, logits, parameters, steps, tiny_gpt2, tiny_llama

from slmjax.errors import UserError
from slmjax.models.decoder import Block, Stage
from slmjax.models.flops import flops_per_token
from slmjax.nn.attention import QKNorm, SharedAttention
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import xla_attention
from slmjax.nn.block import NormedStream, Parallel, ParallelShared, PostBranch, PostNorm, Sandwich
from slmjax.nn.compute import Compute, Remat
from slmjax.nn.embedding import Logits
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.position import Alibi, Learned, NoPosition, Rope
from slmjax.nn.rope_scaling import LinearScaling, LongRope
from slmjax.nn.short_conv import ShortConv
from slmjax.objectives import NextToken
from slmjax.tree import flatten

pytestmark = pytest.mark.fast

BASE = tiny_llama()
BLOCK = BASE.pattern[0]


def mixer(**changes):
    return replace(BASE, pattern=(replace(BLOCK, mixer=replace(BLOCK.mixer, **changes)),))


def wired(kind, **changes):
    made = kind(mixer=BLOCK.mixer, mlp=BLOCK.mlp, norm=BLOCK.norm, **changes)
    return replace(BASE, pattern=(made,))


def attention_of(**changes):
    """The fields of the mixer of `BASE`, changed."""
    names = ("heads", "kv_heads", "head_dim", "position")
    return {**{name: getattr(BLOCK.mixer, name) for name in names}, **changes}


def shared():
    """One layer whose keys and values the next two read."""
    reader = replace(BLOCK, mixer=SharedAttention(**attention_of(source="kv")))
    first = replace(BLOCK, mixer=replace(BLOCK.mixer, shares="kv"))
    return replace(BASE, pattern=(first,), repeats=1, tail=(Stage(pattern=(reader,), repeats=2),))


LONG = LongRope(short=(1.0, 1.5, 2.0, 3.0), long=(4.0, 5.0, 6.0, 7.0), original_context=16, factor=4.0)
VARIANTS = {
    "partial rotary": mixer(position=Rope(fraction=0.5)),
    "linear scaling": mixer(position=Rope(scaling=LinearScaling(factor=3.0))),
    "longrope, long": mixer(position=Rope(scaling=LONG)),
    "longrope, short": mixer(position=Rope(scaling=replace(LONG, original_context=32))),
    "alibi": mixer(position=Alibi()),
    "window": mixer(window=5),
    "softcap": mixer(softcap=0.5),
    "qk norm": mixer(qk_norm=QKNorm(norm=RMSNorm())),
    "qk norm, gain a head": mixer(qk_norm=QKNorm(norm=LayerNorm(bias=False), gain_per_head=True)),
    "qk norm, all heads": mixer(qk_norm=QKNorm(norm=RMSNorm(), whole=True)),
    "post-norm": wired(PostNorm),
    "norm of the stream": wired(NormedStream),
    "sandwich": wired(Sandwich),
    "post-branch norm": wired(PostBranch),
    "parallel": wired(Parallel),
    "parallel, one norm": wired(ParallelShared),
    "branch scale": wired(Block, branch_scale=0.3),
    "gain from 1": replace(BASE, final_norm=RMSNorm(offset=1.0, round_first=False)),
    "no gain": replace(BASE, final_norm=LayerNorm(gain=False, bias=False)),
    "no final norm": replace(BASE, final_norm=None),
    "embedding scale": replace(BASE, embed_scale=math.sqrt(32)),
    "embedding norm": replace(BASE, embed_norm=LayerNorm()),
    "narrow table": replace(BASE, table_width=12),
    "logit scale": replace(BASE, logits=Logits(scale=0.25)),
    "logit softcap": replace(BASE, logits=Logits(softcap=3.0)),
    "learned from row 2": replace(tiny_gpt2(), position=Learned(offset=2)),
    "three stages": replace(
        BASE, tail=(Stage(pattern=(BLOCK, replace(BLOCK, mlp=replace(BLOCK.mlp, hidden=20)))), Stage(pattern=(BLOCK,)))
    ),
    "shared keys and values": shared(),
    "short convolution": replace(
        BASE, pattern=(replace(BLOCK, mixer=ShortConv(channels=24, taps=4, bias=True)), BLOCK), repeats=2
    ),
}


@pytest.fixture(params=VARIANTS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def decoder(name):
    return VARIANTS[name]


@pytest.fixture(scope="module")
def made(decoder):
    """The model, its parameters, and (params, batch) -> the gradient of a random sum of its logits, and they."""
    model = decoder.build()
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, VOCAB)), jnp.float32)

    def score(params, b):
        z = logits(model, params, b)
        return jnp.sum(weights * z), z

    return model, parameters(decoder, model, scale=0.5), jax.jit(jax.grad(score, has_aux=True))


@functools.cache
def logits_of(base):
    model = base.build()
    return logits(model, parameters(base, model, scale=0.5), batch())


def test_it_moves_the_logits_and_every_parameter_matters(name, decoder, made):
    """A parameter that nothing reads would have no gradient."""
    _, params, computed = made
    assert set(flatten(params)) == set(decoder.paths())
    gradient, moved = computed(params, batch())
    base = tiny_gpt2() if name == "learned from row 2" else BASE
    assert jnp.abs(moved - logits_of(base)).max() > 1e-3
    assert all(jnp.abs(g).max() > 1e-6 for g in flatten(gradient).values())


def test_prefill_and_decode_equal_the_full_forward(decoder, made):
    """A row padded on the left among them."""
    model, params, computed = made
    length, pad = LENGTH, jnp.asarray([0, 7])
    slots = jnp.arange(length)[None]
    real = slots >= pad[:, None]
    b = batch(rows=2, length=length)
    b = b._replace(positions=jnp.maximum(slots - pad[:, None], 0), segment_ids=real.astype(jnp.int32))
    step = steps(model)
    # longrope turns all keys by the factors of the sequence so far, as transformers does: one prefill, no comparison
    # across the boundary.
    starts = [(0, length - 2), (length - 2, length - 1), (length - 1, length)]
    cache, pieces = model.init_cache(2, length + 3), []
    for start, stop in starts:
        out, piece = step(params, cache, columns(b, start, stop))
        cache = out.cache
        pieces.append(piece)
    (_, full), cached = computed(params, b), jnp.concatenate(pieces, axis=1)
    error = jnp.abs(jnp.where(real[..., None], cached - full, 0)).max()
    assert error <= 1e-5 * max(1.0, float(jnp.abs(full).max()))


WIRINGS = (
    "alibi", "window", "softcap", "qk norm", "post-norm", "sandwich", "post-branch norm", "parallel, one norm",
    "three stages", "shared keys and values", "short convolution",
)  # fmt: skip
"""The variants whose layers are computed otherwise; the others change a factor, or nothing inside the loop"""


@pytest.mark.parametrize("name", WIRINGS)
def test_every_way_of_computing_gives_the_same_gradient(name):
    decoder = VARIANTS[name]
    params = parameters(decoder, decoder.build(), scale=0.2)  # larger ones make gradients that magnify rounding
    kernels = {"window": xla_attention, "alibi": xla_attention, "softcap": xla_attention}
    way = Compute(attention=kernels.get(name, cpu_attention), unroll=None, remat=Remat())

    def run(compute):
        objective = NextToken().build(decoder.build(compute))
        loss = lambda p: objective.loss(p, (), batch(documents=2), jax.random.key(0))[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradient), (expected, exact) = run(way), run(Compute())
    assert value == pytest.approx(float(expected), rel=1e-5)
    for path, g in flatten(gradient).items():
        reference = flatten(exact)[path]
        assert jnp.abs(g - reference).max() <= 1e-5 * max(1.0, float(jnp.abs(reference).max())), path


def test_what_a_window_hides():
    model = VARIANTS["window"].build()
    params, b = parameters(BASE, model), batch(rows=1)

    def last(table):
        p = {**params, "embed": {"table": table}}
        return jnp.sum(model.apply(p, jnp.arange(24)[None], b.positions, b.segment_ids).hidden[0, -1])

    seen = np.flatnonzero(np.abs(np.asarray(jax.grad(last)(params["embed"]["table"]))).max(1))
    assert seen.min() == 23 - 3 * 4  # three layers, each 4 tokens further back
    assert seen.max() == 23


def test_flops_of_a_window_are_those_of_the_keys_it_shows():
    """T = 24, W = 5: 1 + 2 + 3 + 4 + 20 * 5 pairs, up to the half key that T/2 leaves out too."""
    windowed, full = (flops_per_token(d, 24) for d in (VARIANTS["window"], BASE))
    assert full.attention - full.head == 12 * 3 * 32 * 12
    assert windowed.attention - windowed.head == round(12 * 3 * 32 * (5 - 25 / 48))


def test_alibi_slopes_are_those_of_the_paper():
    assert Alibi().slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert Alibi().slopes(4) == tuple(4.0**-i for i in range(1, 5))
    expected = [*(4.0**-i for i in range(1, 5)), 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(Alibi().slopes(6), expected, rtol=1e-6)


def test_longrope_magnitude_and_factors():
    rope = Rope(scaling=LONG)
    short, long = (rope.frequencies(8, jnp.arange(n)) for n in (16, 17))
    powers = 1e4 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(short, 1 / (np.asarray(LONG.short) * powers), rtol=1e-6)
    np.testing.assert_allclose(long, 1 / (np.asarray(LONG.long) * powers), rtol=1e-6)
    assert LONG.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def test_layers_are_numbered_across_stages():
    decoder = VARIANTS["three stages"]
    assert [(p.path, p.numbers) for p in decoder.places()] == [
        ("layers", (0, 1, 2)),
        ("layers_1/0", (3,)),
        ("layers_1/1", (4,)),
        ("layers_2", (5,)),
    ]
    assert decoder.layers == len(decoder.blocks()) == 6
    assert [block.mlp.hidden for block in decoder.blocks()] == [48, 48, 48, 48, 20, 48]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: mixer(window=0), "window: 0"),
        (lambda: mixer(position=Rope(fraction=0.375)), "head_dim: 3 of 8"),
        (lambda: Stage(pattern=()), "model.pattern"),
        (lambda: replace(LONG, long=(1.0,)), "4 short factors but 1 long"),
        (lambda: mixer(position=Rope(scaling=LONG), head_dim=16).paths(), "4 factors; 8 channel pairs"),
        (
            lambda: replace(shared(), pattern=shared().tail[0].pattern).paths(),
            "no earlier layer shares 'kv'",
        ),
    ],
)
def test_mistakes_are_named(make, names):
    with pytest.raises(UserError, match=names):
        make()


def test_no_position_and_alibi_need_no_table():
    assert NoPosition().table(jnp.zeros((1, 2)), 4) is None
    assert Alibi().table(jnp.zeros((1, 2)), 4) is None
    assert NoPosition().slopes(4) is None
