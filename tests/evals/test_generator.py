"""Generation with the cache against running the whole sequence anew for every token."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from slmjax import tree
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.errors import UserError
from slmjax.evals import decoding, generate
from slmjax.evals.generate import Generator, bucket
from slmjax.evals.sampling import Sampler, sampler
from slmjax.models.decoder import Decoder
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.platform import jaxlib_version
from slmjax.types import Params

LLAMA = llama(layers=3, width=32, heads=4, kv_heads=2, hidden=48, vocab=258, context=256)
GPT2 = gpt2(layers=2, width=32, heads=4, vocab=258, context=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Bytes().make([], tmp_path_factory.mktemp("tokenizer"))


def lively(decoder: Decoder, seed: int = 0) -> Params:
    """Random parameters large enough for the text to depend on everything before it."""
    params = decoder.build().init(jax.random.key(seed))
    return tree.map_with_path(lambda path, x: x * 8 if x.ndim > 2 or path.startswith("embed") else x + 0.1, params)


@pytest.fixture(scope="module")
def generator(tokenizer) -> Generator:
    return Generator(LLAMA, lively(LLAMA), tokenizer)


def from_scratch(g: Generator, prompt: str, count: int, penalty: float = 1.0) -> list[int]:
    """Greedy tokens, each from a forward pass over the whole sequence without a cache."""
    model, ids = g.decoder.build(g.compute), g.encode(prompt)
    length = g.decoder.context

    @jax.jit
    def logits_at(tokens, i):
        positions = jnp.arange(length)[None]
        hidden = model.apply(g.params, tokens[None], positions, jnp.ones((1, length), jnp.int32)).hidden
        return model.unembed(g.params, hidden[0, i])

    made = []
    for _ in range(count):
        logits = np.array(logits_at(jnp.asarray(ids + [0] * (length - len(ids))), len(ids) - 1))
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        made.append(int(logits.argmax()))
        ids.append(made[-1])
        if made[-1] == g.tokenizer.eos_id:
            break
    return made


@pytest.mark.parametrize("decoder", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_the_forward_pass_from_scratch(decoder, penalty, tokenizer):
    """Left padding, prompts of several lengths, several chunks."""
    g = Generator(decoder, lively(decoder), tokenizer)
    prompts = ["", "a much longer prompt, é", "mid"]
    choose = Sampler(rules=sampler(temperature=0.0, repetition_penalty=penalty).rules)
    out = g(prompts, sampler=choose, max_tokens=37)
    expected = [from_scratch(g, prompt, 37, penalty) for prompt in prompts]
    assert [list(o.tokens) for o in out] == expected
    assert len({tuple(e) for e in expected}) == 3
    assert max(len(set(e)) for e in expected) > 5


@pytest.mark.fast
def test_a_growing_cache_changes_nothing(generator, monkeypatch):
    """Slots for 16 new tokens at first, so the cache grows twice on the way."""
    whole = generator(["The quick brown fox"], max_tokens=120)
    monkeypatch.setattr(generate, "AHEAD", 16)
    monkeypatch.setattr(generate, "LEAST_CACHE", 32)
    lengths = []
    key = (generate.GREEDY, generator._ends, False)
    programs = generator._programs[key]
    monkeypatch.setitem(
        generator._programs,
        key,
        programs._replace(grow=lambda state, length: lengths.append(length) or programs.grow(state, length=length)),
    )
    assert generator(["The quick brown fox"], max_tokens=120) == whole
    assert lengths == [128, 256]


@pytest.mark.fast
@pytest.mark.parametrize("decoder", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_prepared_parameters_round_as_the_model_does(decoder):
    """bfloat16: casting once, before, equals casting in every product, bit for bit."""
    compute, params = Compute(dtype="bfloat16"), lively(decoder)
    model = decoding.unrolled(decoder).build(compute)
    prepared = decoding.prepare(decoder, compute, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 9)), jnp.int32)
    rest = (jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32))
    logits = jax.jit(lambda apply, unembed: model.unembed(unembed, model.apply(apply, tokens, *rest).hidden))
    stored = decoding.unroll(decoder, params)
    np.testing.assert_array_equal(logits(prepared["apply"], prepared["unembed"]), logits(stored, params))
    assert {str(x.dtype) for x in jax.tree.leaves(prepared)} == {"float32", "bfloat16"}


@pytest.mark.fast
def test_streaming_gives_the_same_text_in_pieces(generator):
    prompts = ["Once", "upon a time"]
    warm = sampler(temperature=0.9, top_k=50)
    whole = generator(prompts, sampler=warm, max_tokens=50, seed=7)
    texts, pieces = ["", ""], 0
    for piece in generator.stream(prompts, sampler=warm, max_tokens=50, seed=7):
        texts[piece.row] += piece.text
        pieces += 1
    assert texts == [w.text for w in whole]
    assert pieces >= 6
    for w in whole:
        assert w.text == generator.tokenizer.decode(w.tokens)


@pytest.mark.fast
def test_seeds_rows_and_chunks(generator, monkeypatch):
    warm = sampler(temperature=1.0)

    def run(seed, prompts=("a", "a")):
        return [o.tokens for o in generator(prompts, sampler=warm, max_tokens=40, seed=seed)]

    first = run(0)
    assert run(0) == first
    assert run(1) != first
    assert first[0] != first[1]
    assert run(0, ("a",)) == first[:1]
    monkeypatch.setattr(generate, "CHUNK", 5)
    assert run(0) == first


@pytest.mark.fast
def test_frequencies_of_the_first_token_follow_the_model(generator):
    """500 rows of one prompt, each drawing from its own key."""
    rows = 500
    model = generator.decoder.build()
    ids = jnp.asarray(generator.encode("x"))[None]
    hidden = model.apply(generator.params, ids, jnp.arange(2)[None], jnp.ones((1, 2), jnp.int32)).hidden
    expected = np.asarray(jax.nn.softmax(model.unembed(generator.params, hidden[0, -1]) / 0.5), np.float64)
    drawn = [o.tokens[0] for o in generator(["x"] * rows, sampler=sampler(temperature=0.5), max_tokens=1, seed=3)]
    often = np.argsort(expected)[-5:]
    counts = np.bincount(drawn, minlength=258)
    cells = [*counts[often], rows - counts[often].sum()]
    mass = [*expected[often], 1 - expected[often].sum()]
    assert chisquare(cells, np.array(mass) * rows).pvalue > 1e-3


@pytest.mark.fast
def test_stop_strings_cut_the_text_and_end_the_row(generator):
    free = generator(["Hello", "other"], max_tokens=60)
    text = free[0].text
    stop = text[20:23]
    at = text.index(stop)
    cut = generator(["Hello", "other"], max_tokens=60, stop=[stop])
    assert cut[0].reason == "stop"
    assert cut[0].text == text[:at]
    assert len(cut[0].tokens) < 60
    assert cut[0].tokens == free[0].tokens[: len(cut[0].tokens)]


@pytest.mark.fast
def test_eos_ends_a_row_and_no_other(generator):
    """A token that the first row makes in the middle of its text is declared the end."""
    warm = {"sampler": sampler(temperature=1.5), "max_tokens": 40}
    free = generator(["Hello", "other prompt"], **warm)
    raw = generator.tokenizer
    tokenizer = Tokenizer(raw.raw, bos=raw.bos, eos=raw.eos)
    end = tokenizer.eos_id = next(t for i, t in enumerate(free[0].tokens) if i > 4 and t not in free[0].tokens[:i])
    out = Generator(generator.decoder, generator.params, tokenizer)(["Hello", "other prompt"], **warm)
    assert out[0].reason == "eos"
    assert out[0].tokens == free[0].tokens[: free[0].tokens.index(end) + 1]
    other = free[1].tokens
    assert out[1].tokens == (other[: other.index(end) + 1] if end in other else other)


@pytest.mark.fast
def test_the_context_is_never_exceeded(tokenizer):
    g = Generator(GPT2, lively(GPT2), tokenizer)
    out = g(["x" * 50, "x" * 10], max_tokens=1000)
    for o, prompt in zip(out, (51, 11), strict=True):
        assert o.reason in ("context", "eos")
        assert len(o.tokens) == 64 - prompt or o.reason == "eos"
    with pytest.raises(UserError, match=r"the prompt has 65 tokens; the model's context is 64"):
        g(["x" * 64])
    for ids in ([5, 258], [-1]):
        with pytest.raises(UserError, match=rf"token {ids[-1]}; the model has tokens 0 to 257"):
            g([ids])
    with pytest.raises(UserError, match="at least 1"):
        g(["x"], max_tokens=0)
    with pytest.raises(UserError, match="no prompt"):
        g([])


# Of float32 keys, XLA before 0.12 makes the transpose that a product reads.
IN_PLACE = ["bfloat16", "float32"] if jaxlib_version() >= (0, 12) else ["bfloat16"]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", IN_PLACE)
@pytest.mark.parametrize("rows", [1, 3])
def test_no_token_copies_or_reorders_the_cache(dtype, rows):
    """Read from the compiled program: no copy is as large as the keys of a layer."""
    compute, slots = Compute(dtype=dtype), 133
    programs = decoding.decoding(LLAMA, compute, generate.GREEDY, (0,))
    prepared = programs.prepare(lively(LLAMA))
    keys, limits = jax.random.split(jax.random.key(0), rows), np.full(rows, 100)
    prompt = np.ones((2, rows, 16), np.int32)
    state = programs.prefill(prepared, *prompt, keys, limits, length=slots)
    text = programs.decode.lower(prepared, state, keys, limits, count=4).compile().as_text()
    size = math.prod(state.cache.layers[0][0]["k"].shape)
    moved = [line for line in text.splitlines() if " copy(" in line]  # a `transpose` is only another name for an axis
    sizes = [math.prod(int(n) for n in re.search(r"\[([\d,]*)\]", line)[1].split(",") if n) for line in moved]
    assert str(slots) in text
    assert [line for line, n in zip(moved, sizes, strict=True) if n >= size] == []


@pytest.mark.fast
def test_other_parameters_reuse_the_programs(generator):
    other = generator.with_params(lively(LLAMA, seed=5))
    assert other(["Hello"], max_tokens=8)[0].tokens != generator(["Hello"], max_tokens=8)[0].tokens
    assert other._programs is generator._programs


@pytest.mark.fast
def test_buckets():
    assert [bucket(n, 16) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
