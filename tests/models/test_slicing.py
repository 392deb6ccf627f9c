"""A sliced model computes what the whole one does with the removed parts masked, and is a model like any other."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.tiny import DECODERS, batch, logits, parameters, tiny_llama

from slmjax.compress.prune.structured import (
    block_influence,
    channel_importance,
    head_importance,
    most_important,
    most_important_heads,
)
from slmjax.convert.hf import import_hf, write_hf
from slmjax.data.tokenizer import Bytes
from slmjax.errors import UserError
from slmjax.models.families.llama import to_config
from slmjax.models.slicing import keep_heads, keep_hidden, keep_layers, keep_width
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.compute import Compute
from slmjax.nn.initial import Normal
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Numerics, Product
from slmjax.nn.parts import Flow
from slmjax.nn.position import Alibi
from slmjax.objectives import NextToken
from slmjax.tree import flatten, map_with_path
from slmjax.types import Batch

pytestmark = pytest.mark.fast

KEPT_HEADS = [(0, 2), (1, 3), (0, 3)]  # of four, two of which share keys and values


def given(decoder):
    return parameters(decoder, decoder.build())


def assert_same(decoder, params, whole, masked):
    b = batch(documents=2)
    mine, theirs = logits(decoder.build(), params, b), logits(whole.build(), masked, b)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


def zeroed(decoder, params, path, layer, index):
    """`params` with zeros at this index of the parameter `path` of one layer."""
    (place,) = [p for p in decoder.places() if layer in p.numbers]
    at = (place.numbers.index(layer), *index)
    return map_with_path(lambda p, x: x.at[at].set(0.0) if p == f"{place.path}/{path}" else x, params)


@pytest.mark.parametrize("name", DECODERS)
def test_layers(name):
    decoder = DECODERS[name]
    params = given(decoder)
    new, sliced = keep_layers(decoder, params, [i for i in range(decoder.layers) if i != 1])
    assert new.layers == decoder.layers - 1
    masked = params
    for path in ("attn/o", "attn/o_bias", "mlp/down", "mlp/down_bias"):  # nothing is added to the residual stream
        masked = zeroed(decoder, masked, path, 1, ())
    assert_same(new, sliced, decoder, masked)
    assert keep_layers(decoder, params, range(decoder.layers))[0] == decoder


@pytest.mark.parametrize("name", DECODERS)
def test_hidden_channels(name):
    decoder = DECODERS[name]
    params, hidden = given(decoder), decoder.blocks()[0].mlp.hidden
    kept = [sorted(np.random.default_rng(i).permutation(hidden)[:16].tolist()) for i in range(decoder.layers)]
    new, sliced = keep_hidden(decoder, params, kept)
    assert {block.mlp.hidden for block in new.blocks()} == {16}
    masked = params
    for layer, channels in enumerate(kept):
        masked = zeroed(decoder, masked, "mlp/down", layer, (np.setdiff1d(np.arange(hidden), channels),))
    assert_same(new, sliced, decoder, masked)
    assert len(new.stages) == 1


@pytest.mark.parametrize("name", DECODERS)
def test_heads(name):
    decoder = DECODERS[name]
    params = given(decoder)
    kept = [KEPT_HEADS[i % 3] for i in range(decoder.layers)]
    new, sliced = keep_heads(decoder, params, kept)
    for block in new.blocks():
        assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim) == (2, 2, 8)
    masked = params
    for layer, heads in enumerate(kept):
        masked = zeroed(decoder, masked, "attn/o", layer, (np.setdiff1d(np.arange(4), heads),))
    assert_same(new, sliced, decoder, masked)


def test_heads_of_one_group_leave_one_pair_of_keys_and_values():
    decoder = tiny_llama()
    new, sliced = keep_heads(decoder, given(decoder), [(2, 3)] * 3)
    assert (new.blocks()[0].mixer.heads, new.blocks()[0].mixer.kv_heads) == (2, 1)
    np.testing.assert_array_equal(sliced["layers"]["attn"]["k"], given(decoder)["layers"]["attn"]["k"][:, :, 1:])


def masked_width(decoder, params, channels):
    """The whole model with zeros in the other channels. RMSNorm would divide by D; these norms divide by the number
    of channels that are left: with r = left / D,
    x / sqrt(sum x^2 / left + eps) = sqrt(r) x / sqrt(sum x^2 / D + r eps).
    """
    r = len(channels) / decoder.width
    on = jnp.zeros(decoder.width).at[jnp.asarray(channels)].set(1.0)
    axes = flatten(decoder.axes(), is_leaf=lambda x: isinstance(x, tuple))

    def mask(path, x):
        shape = [decoder.width if name == "embed" else 1 for name in axes[path]]
        return x * on.reshape(shape) * (r**0.5 if path.endswith("/scale") else 1.0)

    def of(norm):
        return replace(norm, eps=norm.eps * r)

    pattern = tuple(replace(block, norm=of(block.norm)) for block in decoder.pattern)
    return replace(decoder, pattern=pattern, final_norm=of(decoder.final_norm)), map_with_path(mask, params)


@pytest.mark.parametrize("name", ["llama", "untied", "pattern"])
def test_width(name):
    decoder = DECODERS[name]
    params, channels = given(decoder), sorted(np.random.default_rng(0).permutation(32)[:24].tolist())
    new, sliced = keep_width(decoder, params, channels)
    assert new.width == 24
    assert flatten(sliced)["embed/table"].shape[1] == 24
    assert_same(new, sliced, *masked_width(decoder, params, channels))
    uncorrected = map_with_path(lambda p, x: x / (24 / 32) ** 0.5 if p.endswith("/scale") else x,
                                masked_width(decoder, params, channels)[1])  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same(new, sliced, decoder, uncorrected)


def test_everything_at_once_is_exported_as_llama(tmp_path):
    decoder = tiny_llama(vocab=300)
    params = given(decoder)
    decoder, params = keep_layers(decoder, params, (0, 2))
    decoder, params = keep_hidden(decoder, params, [range(0, 40, 2), range(20)])
    decoder, params = keep_heads(decoder, params, KEPT_HEADS[:2])
    decoder, params = keep_width(decoder, params, range(4, 28))
    expected = tiny_llama(vocab=300, layers=2, width=24, heads=2, kv_heads=2, hidden=20, head_dim=8)
    assert decoder == expected
    assert to_config(decoder) is not None
    (tmp_path / "small").mkdir()
    write_hf(tmp_path / "small", decoder, params, tokenizer=Bytes().make([], tmp_path))
    again = import_hf(tmp_path / "small")
    assert again.decoder == decoder
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], x)


def test_layers_of_different_shapes():
    decoder = tiny_llama()
    params = given(decoder)
    kept = [range(48), range(16), range(16)]
    new, sliced = keep_hidden(decoder, params, kept)
    assert [block.mlp.hidden for block in new.blocks()] == [48, 16, 16]
    assert to_config(new) is None, "no class of transformers has this shape"
    masked = params
    for layer in (1, 2):
        masked = zeroed(decoder, masked, "mlp/down", layer, (slice(16, 48),))
    assert_same(new, sliced, decoder, masked)
    back, of_back = keep_hidden(new, sliced, [range(16)] * 3)
    assert back == keep_hidden(decoder, params, [range(16)] * 3)[0]
    assert len(back.stages) == 1
    assert flatten(of_back)["layers/mlp/up"].shape == (3, 32, 16)


BLOCK = tiny_llama().pattern[0]
ALIBI = replace(tiny_llama(), pattern=(replace(BLOCK, mixer=replace(BLOCK.mixer, position=Alibi())),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keep_layers(tiny_llama(), given(tiny_llama()), (0, 3)), r"layers is \[0, 3\]; .* from 0 to 2"),
        (lambda: keep_layers(tiny_llama(), given(tiny_llama()), (2, 0)), "expected ascending"),
        (lambda: keep_hidden(tiny_llama(), given(tiny_llama()), [(0, 1)]), "hidden has 1 entries; .* 3 layers"),
        (lambda: keep_heads(tiny_llama(), given(tiny_llama()), [(0, 1, 2)] * 3), "unequal numbers of heads"),
        (lambda: keep_heads(ALIBI, given(ALIBI), [(0, 1)] * 3), "layer 0 is no attention"),
        (lambda: keep_width(tiny_llama(), given(tiny_llama()), ()), "channels is"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


# What is important, in a trained model.


def text(seed, rows=16, length=32, vocab=61):
    """Tokens each of which follows from the two before it, mostly."""
    rng, table = np.random.default_rng(seed), np.random.default_rng(0).integers(0, vocab, (8, vocab))
    tokens = rng.integers(0, vocab, (rows, length + 1))
    for t in range(2, length + 1):
        known = rng.random(rows) < 0.9
        tokens[:, t] = np.where(known, table[tokens[:, t - 2] % 8, tokens[:, t - 1]], tokens[:, t])
    tokens, ones = tokens.astype(np.int32), np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)))


def loss_of(decoder, params):
    return float(NextToken().build(decoder.build()).loss(params, (), text(10**6, rows=64), jax.random.key(0))[0])


@dataclass(frozen=True, kw_only=True)
class Recording(Product):
    """Keeps the inputs of products, by the path of the parameter."""

    seen: dict = field(default_factory=dict, hash=False, compare=False)

    def __call__(self, path, equation, x, weight, einsum):
        self.seen[path] = np.asarray(x)
        return einsum(equation, x, weight)


def read(decoder, params, blocks, b):
    """What the products of each layer read: the layer alone, outside of the scan, from the residual stream before it.
    {path: [L, B, T, ...]}"""
    block, seen = decoder.pattern[0], []
    flow = Flow(block.mixer.table(b.positions), Mask.of_rows(b.segment_ids), None, jnp.int32(0), {}, {})
    for i, x in enumerate(blocks[:-1]):
        product = Recording()
        layer = Layer(spec=block, compute=Compute(), initial=Normal(), numerics=Numerics(product=product))
        y, _ = layer.apply({"params": jax.tree.map(lambda x, i=i: x[i], params["layers"])}, x, flow)
        np.testing.assert_allclose(y, blocks[i + 1], atol=1e-4)
        seen.append(product.seen)
    return {path: np.stack([of[path] for of in seen]) for path in seen[0]}


@pytest.fixture(scope="module")
def trained():
    """A decoder of six layers, trained for a few seconds, and what its layers read."""
    decoder = tiny_llama(layers=6, context=32)
    model = decoder.build()
    loss, tx = NextToken().build(model).loss, optax.adam(optax.linear_schedule(5e-3, 0.0, 300))

    @jax.jit
    def step(params, opt, b):
        value, grads = jax.value_and_grad(lambda params: loss(params, (), b, jax.random.key(0))[0])(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    params = model.init(jax.random.key(0))
    opt, first = tx.init(params), loss_of(decoder, params)
    for i in range(300):
        params, opt, _ = step(params, opt, text(i))
    assert loss_of(decoder, params) < first - 0.5
    b = text(10**5)
    output = model.apply(params, b.tokens, b.positions, b.segment_ids, collect=True)
    seen = read(decoder, params, output.blocks, b)
    assert seen["mlp/down"].shape == (6, 16, 32, 48)
    return decoder, params, output, seen


def test_the_layer_of_least_influence_is_missed_less_than_others(trained):
    decoder, params, output, _ = trained
    influence = np.asarray(block_influence(output.blocks))
    without = [loss_of(*keep_layers(decoder, params, most_important(-np.eye(6)[i], 5))) for i in range(6)]
    least = int(influence.argmin())
    assert without[least] < np.mean([x for i, x in enumerate(without) if i != least]) - 0.03
    assert without[int(influence.argmax())] > np.mean(without)


def test_important_channels_and_heads_beat_random_ones(trained):
    decoder, params, output, seen = trained
    rng = np.random.default_rng(0)

    def drawn(of, keep):
        return sorted(rng.permutation(of)[:keep].tolist())

    def losses(cut, important, draw):
        return loss_of(*cut(decoder, params, important)), [loss_of(*cut(decoder, params, draw())) for _ in range(6)]

    hidden = channel_importance(seen["mlp/down"])
    kept = [most_important(x, 24) for x in hidden]
    mine, others = losses(keep_hidden, kept, lambda: [drawn(48, 24) for _ in kept])
    assert mine < min(others)

    heads = head_importance(seen["attn/o"])
    kept = [most_important_heads(x, 2, keep=2, keep_kv=2) for x in heads]
    mine, others = losses(keep_heads, kept, lambda: [drawn(2, 1) + [2 + i for i in drawn(2, 1)] for _ in kept])
    assert mine < min(others)

    norms = [
        *channel_importance(seen["attn/q"]),
        *channel_importance(seen["mlp/up"]),
        channel_importance(output.hidden),
    ]
    width = np.sum(norms, axis=0)
    mine, others = losses(keep_width, most_important(width, 28), lambda: drawn(32, 28))
    assert mine < np.mean(others)
    assert mine < loss_of(*keep_width(decoder, params, most_important(-width, 28)))
