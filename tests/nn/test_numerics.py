"""What is computed is a value: each product with a parameter is told its path, and a cache may store less."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import DECODERS, batch, logits, parameters, tiny_llama

from slmjax import tree
from slmjax.config import Experiment, identity
from slmjax.convert.expressed import expressed
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.errors import UserError
from slmjax.evals.decoding import decoding
from slmjax.evals.generate import GREEDY, Generator
from slmjax.models.assembly import is_declared
from slmjax.models.decoder import Stage
from slmjax.models.families.bert import bert
from slmjax.models.families.lfm2 import lfm2
from slmjax.models.families.mobilebert import mobilebert
from slmjax.nn.compute import Compute
from slmjax.nn.heads import Classifier
from slmjax.nn.numerics import Cache, Numerics, Product, put, take
from slmjax.optim.schedules import Constant
from slmjax.serialise import fingerprint, from_json, to_json

pytestmark = pytest.mark.fast

LOOKED_UP = ("embed/table", "embed/positions", "embed/types", "*/taps", "head/rest")
"""Parameters of random initial values that are no side of a product, or not by themselves"""
SMALL = {"layers": 2, "width": 16, "heads": 2, "vocab": 61, "context": 32}
BERT = bert(**SMALL, hidden=24)
TAIL = replace(tiny_llama(), tail=(Stage(pattern=(tiny_llama(theta=1e2).pattern[0],), repeats=2),))
MODELS = {
    **DECODERS,
    "tail": TAIL,
    "short convolutions": lfm2(
        attends=(False, True, False), width=16, heads=2, kv_heads=1, hidden=24, vocab=61, context=32
    ),
    "bert": BERT,
    "classifier": replace(BERT, head=Classifier()),
    "mobilebert": mobilebert(**SMALL, inner=8, embedding=8, hidden=24),
}


@dataclass(frozen=True, kw_only=True)
class Spy(Product):
    """Exact, and notes each parameter that it is given."""

    seen: list = field(default_factory=list, compare=False)

    def __call__(self, path, equation, x, weight, einsum):
        self.seen.append((path, weight.shape))
        return einsum(equation, x, weight)


@pytest.mark.parametrize("name", MODELS)
def test_each_product_is_told_the_path_of_its_parameter(name):
    assembly, spy = MODELS[name], Spy()
    model, b = assembly.build(Compute(), Numerics(product=spy)), batch(length=8)
    params = jax.eval_shape(model.init, jax.random.key(0))
    spy.seen.clear()
    jax.eval_shape(lambda p: logits(model, p, b), params)
    declared = tree.flatten(assembly.declared(), is_leaf=is_declared)
    drawn = {path: d.value.shape for path, d in declared.items() if d.initial.startswith("normal")}
    products = {path: shape for path, shape in drawn.items() if not tree.matches(path, LOOKED_UP)}
    table = "head/classify" if name == "classifier" else "unembed/table" if name == "untied" else "embed/table"
    products[table] = (61, 16) if name == "mobilebert" else drawn[table]  # with the columns of head/rest
    stacked = {path: shape[1:] if path.startswith("layers") else shape for path, shape in products.items()}
    assert dict(spy.seen) == stacked


@dataclass(frozen=True, kw_only=True)
class CoarseActivations(Product):
    """Whole numbers up to `levels`, with a scale for each token, where a parameter has one of these paths."""

    patterns: tuple[str, ...]
    levels: int = 7

    def __call__(self, path, equation, x, weight, einsum):
        if tree.matches(path, self.patterns):
            scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / self.levels
            x = jnp.round(x / jnp.maximum(scale, 1e-9)) * scale
        return einsum(equation, x, weight)


@dataclass(frozen=True, kw_only=True)
class Int8Cache(Cache):
    """8 bits with a scale for each token and head."""

    def init(self, batch, heads, length, width, dtype):
        values = jnp.zeros((batch, heads, length, width), jnp.int8)
        return {"values": values, "scale": jnp.zeros((batch, heads, length, 1), jnp.float32)}

    def write(self, stack, new, depth, start):
        new = new.swapaxes(1, 2).astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(new), axis=-1, keepdims=True) / 127, 1e-9)
        stored = {"values": jnp.round(new / scale), "scale": scale}
        return {name: put(stack[name], stored[name], depth, start) for name in stored}

    def read(self, stack, depth, dtype):
        values, scale = (take(stack[name], depth) for name in ("values", "scale"))
        return (values * scale).swapaxes(1, 2).astype(dtype)


def stepwise(model, params, b):
    """Logits of pieces, through a cache."""
    step, cache, pieces = jax.jit(lambda c, *x: model.apply(params, *x, cache=c)), model.init_cache(2, 10), []
    for start, stop in ((0, 6), (6, 7), (7, 8)):
        out = step(cache, *(x[:, start:stop] for x in (b.tokens, b.positions, b.segment_ids)))
        cache, pieces = out.cache, [*pieces, model.unembed(params, out.hidden)]
    return jnp.concatenate(pieces, axis=1), cache


def test_a_cache_of_eight_bits():
    decoder, b = TAIL, batch(length=8)
    plain, coarse = decoder.build(), decoder.build(Compute(), Numerics(cache=Int8Cache()))
    params = parameters(decoder, plain, scale=0.1)
    exact, whole = stepwise(plain, params, b)
    rounded, small = stepwise(coarse, params, b)
    error = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
    assert 0 < error < 0.02
    assert {x.dtype.name for x in jax.tree.leaves(small.layers)} == {"int8", "float32"}
    ratio = tree.nbytes(small.layers) / tree.nbytes(whole.layers)
    assert ratio == (8 + 4) / (8 * 4)  # 8 channels and their scale
    np.testing.assert_array_equal(logits(coarse, params, b), logits(plain, params, b))  # training has no cache


def test_generation_computes_what_evaluation_does(tmp_path):
    """Generation cuts the layers apart; a product chosen by path is still the same."""
    decoder = replace(TAIL, repeats=2, vocab=258, context=256)
    numerics = Numerics(product=CoarseActivations(patterns=("layers/attn/*", "layers_1/mlp/down")))
    params = parameters(decoder, decoder.build())
    tokenizer = Bytes().make([], tmp_path)
    (made,) = Generator(decoder, params, tokenizer, numerics=numerics)(["Hello"], max_tokens=20)
    (exact,) = Generator(decoder, params, tokenizer)(["Hello"], max_tokens=20)
    assert made.tokens != exact.tokens
    model, ids = decoder.build(Compute(), numerics), tokenizer.encode("Hello", bos=True)
    tokens = jnp.asarray([[*ids, *made.tokens]])
    row = (jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    best = jnp.argmax(model.unembed(params, model.apply(params, tokens, *row).hidden), axis=-1)
    assert tuple(best[0, len(ids) - 1 : -1].tolist()) == made.tokens
    spy = Spy()
    programs = decoding(decoder, Compute(), GREEDY, (0,), Numerics(product=spy))
    prompt = np.ones((2, 1, 16), np.int32)
    keys = jax.random.split(jax.random.key(0), 1)
    jax.eval_shape(lambda p: programs.prefill(programs.prepare(p), *prompt, keys, np.ones(1), length=32), params)
    paths = {path for path, _ in spy.seen}
    assert paths == {p for p in decoder.paths() if not p.endswith("scale")}


def test_an_experiment_is_another_with_other_numerics():
    data = PackedText(train=(Part(source="x"),), length=8, batch=2)
    plain = Experiment(name="a", model=tiny_llama(), data=data, schedule=Constant(peak_lr=1e-3), steps=1)
    coarse = replace(plain, numerics=Numerics(product=CoarseActivations(patterns=("layers*",)), cache=Int8Cache()))
    assert from_json(to_json(coarse)) == coarse
    assert fingerprint(identity(plain, [])) != fingerprint(identity(coarse, []))


def test_no_stock_runtime_computes_other_numerics():
    assert expressed(tiny_llama(), Numerics()).family.name == "Llama"
    with pytest.raises(UserError, match=r"numerics\.cache is Int8Cache\(\), which no stock runtime computes"):
        expressed(tiny_llama(), Numerics(cache=Int8Cache()))
