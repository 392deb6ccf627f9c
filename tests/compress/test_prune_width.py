"""Heads and channels of the residual stream pruned by activations: what is small goes, and the model
that is left is that of `models.slicing`, whose logits are those of the masked model (tests/models/test_slicing.py)."""

from dataclasses import replace

import numpy as np
import pytest
from models.tiny import batch, parameters, tiny_gpt2, tiny_llama

from slmjax import tree
from slmjax.convert.expressed import expressed
from slmjax.errors import UserError
from slmjax.models.slicing import keep_heads, keep_width
from slmjax.runs.pruning_width import WIDTHS, exported_size
from slmjax.runs.quantizing import silent

DECODER = tiny_llama(layers=2, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def params():
    return parameters(DECODER, DECODER.build())


def changed(params, path, change):
    return tree.map_with_path(lambda p, x: change(x) if p == path else x, params)


def pruned(params, width, sparsity):
    return WIDTHS[width](sparsity=sparsity)(DECODER, params, (batch(),), silent)


def assert_equal(found, wanted):
    (model, params), (other, expected) = found, wanted
    assert model == other
    flat = tree.flatten(expected)
    for path, x in tree.flatten(params).items():
        np.testing.assert_array_equal(x, flat[path], path)
    expressed(model)  # raises where no class of transformers computes it


def test_the_group_of_heads_with_short_outputs_goes(params):
    """In layer 0 the values of group 0 are small, in layer 1 those of group 1: the two heads that read them go."""
    small = changed(params, "layers/attn/v", lambda x: x.at[0, :, 0].mul(1e-2).at[1, :, 1].mul(1e-2))
    kept = [(2, 3), (0, 1)]
    found = pruned(small, "heads", 0.5)
    assert_equal(found, keep_heads(DECODER, small, kept))
    mixer = found[0].blocks()[0].mixer
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim) == (2, 1, 8)


def test_the_channels_that_every_norm_makes_small_go(params):
    small = np.arange(0, 32, 4)
    for path in ("layers/attn_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"):
        params = changed(params, path, lambda x: x.at[..., small].mul(1e-3))
    assert_equal(
        pruned(params, "model", 0.25), keep_width(DECODER, params, np.setdiff1d(np.arange(32), small).tolist())
    )


def test_a_width_that_its_class_cannot_have_is_not_chosen():
    """GPT-2 needs a width that its four heads divide; Mistral has a Llama of any width."""
    assert exported_size(26, 32, lambda n: tiny_gpt2(width=n)) == 24
    assert exported_size(26, 32, lambda n: replace(DECODER, width=n)) == 26
    assert expressed(replace(DECODER, width=26)).family.name == "Mistral"


def test_a_group_cannot_be_halved(params):
    with pytest.raises(UserError, match=r"leaves 0 of 2 groups of heads that share keys and values"):
        pruned(params, "heads", 0.9)
