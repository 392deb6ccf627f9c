"""LFM2 against stock transformers: any order of layers, any number of taps, and what padding may not do."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.shapes import padded
from families.proof import logits, moves, prove, prove_any
from hypothesis import strategies as st

from slmjax.convert.hf import family_of
from slmjax.errors import UserError
from slmjax.models.decoder import Stage
from slmjax.models.families import lfm2
from slmjax.models.flops import flops_per_token, parameter_count
from slmjax.nn.short_conv import ShortConv

PUBLISHED = {  # from the model cards
    lfm2.lfm2_350m: 354_483_968,
    lfm2.lfm2_700m: 742_489_344,
    lfm2.lfm2_1_2b: 1_170_340_608,
    lfm2.lfm2_2_6b: 2_569_272_320,
}
FFN = st.sampled_from(
    [
        {"intermediate_size": 40, "block_auto_adjust_ff_dim": False},
        {"intermediate_size": 50, "block_multiple_of": 8},
        {"block_ff_dim": 50, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.3},
    ]
)


def config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1,
        "intermediate_size": 40, "block_auto_adjust_ff_dim": False, "max_position_embeddings": 128,
        "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
    }  # fmt: skip
    return {"model_type": "lfm2", **sizes, **changes}


@st.composite
def configs(draw, **fixed):
    heads, kv_heads, head_dim, width = draw(st.sampled_from([(3, 1, 8, 24), (4, 2, 6, 32)]))
    order = draw(st.sampled_from(["ca", "cac", "accac", "ccacca"]))
    sizes = config()
    del sizes["intermediate_size"], sizes["block_auto_adjust_ff_dim"]
    return {
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": width,
        "num_hidden_layers": len(order),
        "layer_types": ["conv" if c == "c" else "full_attention" for c in order],
        "conv_L_cache": draw(st.integers(2, 5)),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e6, 1e3]))},
        **draw(FFN),
        **fixed,
    }


def test_any_lfm2(reference):
    prove_any(reference, configs())


def test_biases(reference, tmp_path):
    """Of one row, without padding: with biases, transformers lets the projection of padding reach the first tokens."""
    prove(reference, tmp_path, config(conv_bias=True), rows=1)


def test_lfm2_generates_the_same_64_tokens(reference, tmp_path):
    right = prove(reference, tmp_path, config(tie_word_embeddings=False), seed=1, tokens=64)
    d = right.decoder
    (conv, attention, last), fewer = d.pattern, replace(d.pattern[0].mixer, taps=3, channels=24)
    assert conv == last
    assert fewer == conv.mixer
    for wrong in (
        replace(d, pattern=(conv, replace(attention, mixer=replace(attention.mixer, qk_norm=None)), last)),
        replace(d, pattern=(conv, replace(attention, mixer=replace(attention.mixer, position=Rope100)), last)),
    ):
        assert moves(d, wrong, right.params)


Rope100 = replace(lfm2.lfm2_350m().pattern[-1].mixer.position, theta=100.0)


@pytest.fixture(scope="module")
def small():
    """A decoder of convolutions alone, and parameters."""
    d = lfm2.from_config(config())
    d = replace(d, pattern=(d.pattern[0],), repeats=3)
    params = d.build().init(jax.random.key(0))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return d, jax.tree.map(noise, params)


@pytest.mark.fast
def test_a_convolution_stays_in_its_segment(small):
    """Two documents in a row give what each gives alone; the gradient reaches (taps - 1) * layers tokens back."""
    d, params = small
    model = d.build()
    x = jnp.asarray(padded(d, rows=1, length=16)[0])
    segments = jnp.repeat(jnp.asarray([[1, 2]]), 8, axis=1)
    positions = jnp.tile(jnp.arange(8), 2)[None]
    both = model.apply(params, x, positions, segments).hidden
    alone = [model.apply(params, x[:, s], positions[:, s], segments[:, s]).hidden for s in np.s_[:8, 8:]]
    np.testing.assert_allclose(both, jnp.concatenate(alone, axis=1), atol=1e-6)

    def last(table):
        ones = jnp.ones_like(tokens)
        return model.apply({**params, "embed": {"table": table}}, tokens, tokens, ones).hidden[0, -1].sum()

    tokens = jnp.arange(16)[None]
    seen = np.flatnonzero(np.abs(np.asarray(jax.grad(last)(params["embed"]["table"]))).max(1))
    assert seen.min() == 15 - 2 * 3
    assert seen.max() == 15


@pytest.mark.fast
def test_padding_reaches_no_token_even_with_biases(small):
    d = replace(small[0], pattern=(replace(small[0].pattern[0], mixer=ShortConv(channels=24, taps=4, bias=True)),))
    model = d.build()
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    x, mask = padded(d, rows=2, length=16)
    pad = int((mask[1] == 0).sum())
    alone = logits(d, params, x[1:, pad:], mask[1:, pad:])
    np.testing.assert_allclose(logits(d, params, x, mask)[1:, pad:], alone, atol=1e-5)


@pytest.mark.fast
def test_every_tap_and_gate_matters(small):
    d, params = small
    x, mask = padded(d, rows=2, length=16)
    right = logits(d, params, x, mask)
    for name, axis in (("b", None), ("c", None), ("x", None), ("taps", 0), ("taps", 1), ("taps", 2)):
        conv = dict(params["layers"]["conv"])
        conv[name] = conv[name] * 0.5 if axis is None else conv[name].at[..., axis].mul(0.5)
        wrong = {**params, "layers": {**params["layers"], "conv": conv}}
        assert np.abs(logits(d, wrong, x, mask) - right).max() > 1e-3, (name, axis)


@pytest.mark.fast
@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_published_counts(size):
    assert parameter_count(size()) == PUBLISHED[size]
    assert f"{PUBLISHED[size]:,} parameters" in size.__doc__
    assert family_of(size()).name == "LFM2"


@pytest.mark.fast
def test_the_first_release_of_the_config_is_understood():
    """The keys of LFM2-1.2B as it was published."""
    published = {
        "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-5, "block_out_init_scale": 1.0,
        "block_use_swiglu": True, "block_use_xavier_init": True, "conv_L_cache": 3, "conv_bias": False,
        "conv_dim": 2048, "conv_dim_out": 2048, "conv_use_xavier_init": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 128000, "model_type": "lfm2",
        "norm_eps": 1e-5, "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rope_theta": 1000000.0, "theta": 1000000.0, "tie_embedding": True,
        "use_pos_enc": True, "vocab_size": 65536,
    }  # fmt: skip
    assert lfm2.from_config(published) == lfm2.lfm2_1_2b()


@pytest.mark.fast
def test_only_attention_in_the_layers_counts_its_flops():
    d = lfm2.from_config(config())
    flops = flops_per_token(d, 20)
    assert flops.attention - flops.head == 12 * 24 * 10  # one layer of three: 2 * 2 * 3 * 24 channels * 10 keys


@pytest.mark.fast
def test_attention_in_every_layer_is_a_qwen3():
    all_attend = lfm2.from_config(config(layer_types=["full_attention"] * 3))
    assert lfm2.to_config(all_attend) is None
    assert family_of(all_attend).name == "Qwen3"


@pytest.mark.fast
def test_layers_that_repeat_are_one_scan():
    stages = lfm2.lfm2_1_2b().stages
    assert [(len(s.pattern), s.repeats) for s in stages] == [(3, 3), (2, 3), (1, 1)]
    assert all(isinstance(s, Stage) for s in stages)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"layer_types": ["conv", "mamba", "conv"]}, "layer_types"),
        ({"layer_types": ["conv"]}, "layer_types"),
        ({"full_attn_idxs": [0]}, "layer_types and full_attn_idxs differ"),
        ({"block_ff_dim": 99}, "intermediate_size = 40 but block_ff_dim = 99"),
        ({"block_use_swiglu": False}, "block_use_swiglu"),
        ({"theta": 5.0}, "theta = 5.0"),
        ({"conv_L_cache": 0}, "taps"),
        ({"num_experts": 4}, "num_experts"),
        ({"tie_embedding": True, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_read_is_named(changes, names):
    with pytest.raises(UserError, match=names):
        lfm2.from_config(config(**changes))
