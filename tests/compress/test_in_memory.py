"""Models run from the codes of their weights: the results of the floats, in the memory of the codes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import DECODERS, batch, parameters, tiny_llama

from slmjax import tree
from slmjax.compress.quant.activations import RoundedInputs
from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.cache import RoundedCache
from slmjax.compress.quant.float4 import NVFP4
from slmjax.compress.quant.in_memory import InMemory
from slmjax.compress.quant.into_memory import floats, held, packed_in, with_codes
from slmjax.compress.quant.learned import Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.compress.quant.view import Rule, with_values
from slmjax.evals.decoding import decoding
from slmjax.evals.perplexity import evaluate
from slmjax.evals.sampling import GREEDY
from slmjax.losses.next_token import cross_entropy
from slmjax.nn.compute import Compute
from slmjax.nn.encoded import is_encoded
from slmjax.nn.numerics import Numerics
from slmjax.runs.quantizing import RTN, silent

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Quick to compile; and the scheduler that slmjax chooses (platform.py), which the tests leave to XLA"""
TABLES = ("*embed/table",)
QUANTIZERS = {
    "1 bit": Binary(),
    "2 bits, no zero": Balanced(granularity=PerGroup(size=16)),
    "ternary, whole matrix": BitNet(),
    "3 bits, groups": Symmetric(bits=3, granularity=PerGroup(size=8)),
    "4 bits": Symmetric(bits=4),
    "5 bits, zero points, groups": Asymmetric(bits=5, granularity=PerGroup(size=16)),
    "7 bits, zero points": Asymmetric(bits=7),
    "8 bits": Symmetric(bits=8),
    "4 bits, NVFP4": NVFP4(),
}


def pair(decoder, quantizer, tables=None):
    """(the parameters as floats, as codes, the codes one by one): tables in 5 bits."""
    rules = (Rule(quantizer=quantizer), Rule(quantizer=tables or Symmetric(bits=5), patterns=TABLES))
    params = parameters(decoder, decoder.build())
    packed = RTN()(decoder, params, rules, (), silent).packed
    return with_values(params, packed), held(with_codes(params, packed)), packed


def at_once(params, count):
    """The tree, so that only so many bytes of floats of each matrix exist at once."""
    change = lambda x: replace(x, at_once=count) if isinstance(x, InMemory) else x  # noqa: E731
    return jax.tree.map(change, params, is_leaf=is_encoded)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_and_codes_come_back(name):
    exact, short, packed = pair(tiny_llama(vocab=53), QUANTIZERS[name], tables=QUANTIZERS[name])
    assert set(packed) == set(packed_in(short))
    for path, found in packed_in(short).items():
        for a, b in zip(found.codes, packed[path].codes, strict=True):
            assert (a is None) == (b is None), path
            np.testing.assert_array_equal(a, b) if a is not None else None
    flat = tree.flatten(exact)
    for path, x in tree.flatten(floats(short)).items():
        np.testing.assert_array_equal(x, flat[path])
    table, ids = short["embed"]["table"], jnp.asarray([[0, 52, 7], [13, 14, 40]])
    np.testing.assert_array_equal(jax.jit(lambda table: table.rows(ids))(table), flat["embed/table"][ids])
    bits = {"1 bit": 1, "2 bits, no zero": 2, "ternary, whole matrix": 2}.get(name) or int(name[0])
    up = short["layers"]["mlp"]["up"]
    weights = up.shape[0] * up.shape[1] * up.shape[2]
    assert sum(part.nbytes for part in up.parts) == weights * bits / 8
    if name == "4 bits, NVFP4":  # a byte for each block, a float32 for each matrix
        assert up.nbytes == weights * (4 + 8 / 16) / 8 + 4 * up.shape[0]


@pytest.mark.parametrize(
    ("model", "unroll", "numerics"),
    [
        ("gpt2", None, Numerics()),
        ("untied", 1, Numerics(product=RoundedInputs(bits=8))),
        ("pattern", 1, Numerics()),
    ],
)
def test_the_loss_is_that_of_the_floats(model, unroll, numerics):
    decoder = DECODERS[model]
    exact, short, _ = pair(decoder, Symmetric(bits=3))
    built = decoder.build(Compute(unroll=unroll), numerics)
    b = batch(documents=2)
    wanted = evaluate(built, exact, [b]).loss.value
    assert evaluate(built, short, [b]).loss.value == pytest.approx(wanted, rel=1e-7)
    if numerics == Numerics():  # else an activation between two codes may go the other way
        assert evaluate(built, at_once(short, 2000), [b]).loss.value == pytest.approx(wanted, rel=1e-6)


CACHES = {"plain": Numerics(), "8 bits": Numerics(cache=RoundedCache(bits=8))}


@pytest.mark.parametrize(("model", "numerics"), [("untied", "8 bits"), ("pattern", "plain")])
def test_greedy_tokens_are_those_of_the_floats(model, numerics):
    decoder = DECODERS[model]
    exact, short, _ = pair(decoder, Symmetric(bits=4, granularity=PerGroup(size=16)))
    prompts, rows = np.array(batch(length=8).tokens), np.ones((2, 8), np.int32)
    keys, limits = jax.random.split(jax.random.key(0), 2), np.full(2, 21, np.int32)
    made = []
    for stacked, params in ((False, exact), (True, short), (True, at_once(short, 2000))):
        programs = decoding(decoder, Compute(), GREEDY, (), CACHES[numerics], stacked=stacked)
        prepared = programs.prepare(params)
        state = programs.prefill(prepared, prompts, rows, keys, limits, length=32)
        first = np.asarray(state.token)[:, None]
        tokens, _ = programs.decode(prepared, state, keys, limits, count=20)
        made.append(np.concatenate([first, tokens], axis=1))
    assert len(np.unique(made[0])) > 5
    for found in made[1:]:
        np.testing.assert_array_equal(found, made[0])


DEEP = tiny_llama(layers=32, width=128, heads=4, kv_heads=2, hidden=384, vocab=512)


@pytest.fixture(scope="module")
def deep():
    exact, short, _ = pair(DEEP, Balanced(), tables=Symmetric(bits=4))
    return exact, short


def temporaries(f, *args, options=None):
    return jax.jit(f, compiler_options=options).lower(*args).compile().memory_analysis().temp_size_in_bytes


def outside(params):
    """The negative control: the tree whose floats are all made before the first layer."""
    return jax.tree.map(lambda x: x.values() if is_encoded(x) else x, params, is_leaf=is_encoded)


def test_evaluation_takes_the_memory_of_the_codes(deep):
    exact, short = deep
    b, model = batch(rows=1), DEEP.build()

    def loss(params):
        hidden = model.apply(params, b.tokens, b.positions, b.segment_ids).hidden
        values = cross_entropy(model.unembed(params, hidden), b.targets)["loss"]
        return jnp.sum(values * b.weights)

    packed = tree.nbytes(short)
    assert packed < 0.1 * tree.nbytes(exact)
    activations = 2 * 24 * 512 * 4  # twice the logits, the largest of them
    assert temporaries(loss, short) - activations < 0.25 * packed
    assert temporaries(lambda params: loss(outside(params)), short) - activations > 4 * packed


def test_unrolled_layers_take_the_memory_of_the_codes(deep):
    """Without a loop over layers, the floats of one layer are gone before those of the next are made."""
    _, short = deep
    eight = held({**short, "layers": jax.tree.map(lambda x: x[:8], short["layers"])})
    decoder, b = replace(DEEP, repeats=8), batch(rows=1, length=8)
    model = decoder.build(Compute(unroll=None))

    def hidden(params):
        return model.apply(params, b.tokens, b.positions, b.segment_ids).hidden

    packed, activations = tree.nbytes(eight), 8 * 384 * 4 * 4  # those of one feed-forward layer, four times
    assert temporaries(hidden, eight, options=QUICK) - activations < 0.25 * packed


def test_generation_takes_the_memory_of_the_codes(deep):
    _, short = deep
    keys, limits = jax.random.split(jax.random.key(0), 1), np.full(1, 20, np.int32)
    programs = decoding(DEEP, Compute(), GREEDY, (), stacked=True)
    prepared = programs.prepare(short)
    kept = {id(x) for x in jax.tree.leaves(short)}
    assert sum(x.nbytes for x in jax.tree.leaves(prepared) if id(x) not in kept) == 0
    state = programs.prefill(prepared, *np.ones((2, 1, 8), np.int32), keys, limits, length=32)

    def compiled(step, params):
        lowered = jax.jit(step, static_argnames="count").lower(params, state, keys, limits, count=8)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    packed, cache = tree.nbytes(short), tree.nbytes(state)
    assert compiled(programs.decode, prepared) - cache < 0.25 * packed

    def control(params, *args, count):
        return programs.decode(outside(params), *args, count=count)

    assert compiled(control, prepared) - cache > 4 * packed
