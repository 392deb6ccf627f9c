"""Flags set before jax is imported, and the CPU's own attention and products against the plain ones."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import platform
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import Mask, Scores, reference_attention
from slmjax.nn.einsum_cpu import cpu_einsum, transpose
from slmjax.nn.position import Alibi

pytestmark = pytest.mark.fast

KNOWN = platform.Flag(name="xla_cpu_a", value="true", since=(0, 12), until=(0, 13))
NEW = platform.Flag(name="xla_cpu_b", value="dot", since=(0, 99), until=(1, 0))


def test_the_users_flags_win():
    assert platform.xla_flags("--xla_cpu_a=false --other", (0, 12), (KNOWN,)) == "--xla_cpu_a=false --other"
    assert platform.xla_flags("--other=1", (0, 12), (KNOWN,)) == "--xla_cpu_a=true --other=1"


@pytest.mark.parametrize("version", [(0, 10), (0, 11), (0, 13)])
def test_flags_of_other_versions_are_left_out(version):
    assert platform.xla_flags("", version, (KNOWN, NEW)) == ""


def test_the_switch_turns_flags_off():
    environ = {platform.SWITCH: "off", "XLA_FLAGS": "--mine"}
    platform.configure(environ)
    assert environ["XLA_FLAGS"] == "--mine"


def test_the_users_cache_folder_is_kept():
    environ = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    platform.configure(environ)
    assert environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_flags_are_added_on_request():
    environ = {platform.SWITCH: "onednn", "XLA_FLAGS": "--mine"}
    platform.configure(environ)
    assert environ["XLA_FLAGS"].endswith("--mine")


def test_malloc_is_tuned_by_starting_over_once():
    code = (
        "import os, sys; from slmjax import platform; platform.tune_malloc();"
        "print(os.environ.get('GLIBC_TUNABLES'), os.getpid(), *sys.argv[1:])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in (platform.SWITCH, "GLIBC_TUNABLES")}
    cases = (({}, platform.MALLOC), ({"GLIBC_TUNABLES": "mine"}, "mine"), ({platform.SWITCH: "off"}, None))
    for given, expected in cases:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "one two", "3"], env=clean | given, stdout=subprocess.PIPE, text=True
        )
        out, _ = process.communicate()
        assert out.strip() == f"{expected} {process.pid} one two 3"


def test_configure_imports_no_jax_and_xla_accepts_the_flags():
    code = (
        "import sys; from slmjax import platform; platform.configure(); assert 'jax' not in sys.modules;"
        "import jax; print(jax.devices()[0].platform)"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {platform.SWITCH: "onednn"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpu"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


SEGMENTS = {
    "one document": lambda b, t: np.ones((b, t)),
    "packed, then padding": lambda b, t: np.tile(
        np.where(np.arange(t) < t // 3, 1, 2) * (np.arange(t) < t - 3), (b, 1)
    ),
    "left padding": lambda b, t: np.tile(np.arange(t) >= 4, (b, 1)),
}


RULES = {
    "plain": lambda heads: Scores(scale=0.3),
    "all": lambda heads: Scores(scale=0.3, softcap=2.0, window=5, slopes=Alibi().slopes(heads)),
    "window over blocks": lambda heads: Scores(scale=0.3, window=150),
    "two ways": lambda heads: Scores(scale=0.3, causal=False),
    "two ways, window": lambda heads: Scores(scale=0.3, window=150, causal=False),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("t", "heads", "kv_heads"), [(16, 4, 4), (13, 6, 2), (33, 4, 1), (201, 2, 1), (530, 2, 2)])
def test_attention_and_its_gradient_equal_the_reference(segments, t, heads, kv_heads, rule):
    b, width = 2, 8
    ids = jnp.asarray(segments(b, t), jnp.int32)
    mask = Mask.of_rows(ids)
    q, k, v = draw(0, b, t, heads, width), draw(1, b, t, kv_heads, width), draw(2, b, t, kv_heads, width)
    g = draw(3, b, t, heads, width)

    def run(attention):
        return jax.vjp(lambda *qkv: attention(*qkv, mask, rule(heads)), q, k, v)

    (ours, back), (reference, reference_back) = run(cpu_attention), run(reference_attention)
    np.testing.assert_allclose(ours, reference, atol=2e-6)
    for mine, theirs in zip(back(g), reference_back(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)


def test_decoding_reads_the_cache_as_the_reference_does():
    q, k, v = draw(0, 2, 1, 4, 8), draw(1, 2, 12, 2, 8), draw(2, 2, 12, 2, 8)
    mask = Mask.of_cache(jnp.ones((2, 1), jnp.int32), jnp.ones((2, 12), jnp.int32), jnp.int32(7))
    rule = Scores(scale=0.3)
    np.testing.assert_array_equal(cpu_attention(q, k, v, mask, rule), reference_attention(q, k, v, mask, rule))


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("btd,dhk->bthk", (2, 5, 6), (6, 3, 4)),
        ("bthk,hkd->btd", (2, 5, 3, 4), (3, 4, 6)),
        ("btd,df->btf", (2, 5, 6), (6, 7)),
        ("...d,vd->...v", (2, 5, 6), (9, 6)),
        ("btd,dbf->bf", (2, 5, 6), (6, 2, 3)),  # no plain matrix product: falls back
    ],
)
def test_products_and_their_gradients_equal_einsum(equation, x, weight):
    x, weight = draw(0, *x), draw(1, *weight)
    ours, back = jax.vjp(lambda *a: cpu_einsum(equation, *a), x, weight)
    plain, plain_back = jax.vjp(lambda *a: jnp.einsum(equation, *a), x, weight)
    g = draw(2, *plain.shape)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for mine, theirs in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 7, 1025])
def test_transpose_joins_all_its_pieces(rows):
    x = draw(0, 2, rows, 3)
    np.testing.assert_array_equal(transpose(x), jnp.swapaxes(x, 1, 2))
