"""Numbers that no part can have are refused where they are given, by name."""

import math
from dataclasses import replace

import pytest
from models.tiny import tiny_llama

from slmjax.errors import UserError
from slmjax.models.families.bert import bert
from slmjax.nn.attention import Attention
from slmjax.nn.bottleneck import Bottleneck
from slmjax.nn.embedding import Logits
from slmjax.nn.initial import Normal
from slmjax.nn.mlp import MLP, GatedMLP
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.position import NoPosition, Rope
from slmjax.nn.rope_scaling import LinearScaling, Llama3Scaling, LongRope, Yarn

pytestmark = pytest.mark.fast

ATTENTION = {"heads": 2, "kv_heads": 2, "head_dim": 8, "position": NoPosition()}
LONG = {"short": (1.0,), "long": (2.0,), "original_context": 8, "factor": 2.0}
WRONG = {
    "eps: -1 of a norm": lambda: RMSNorm(eps=-1),
    "eps: nan of a norm": lambda: LayerNorm(eps=math.nan),
    "eps: 1000 of a norm": lambda: LayerNorm(eps=1000),
    "theta: -10000.0 is not a positive number": lambda: Rope(theta=-1e4),
    "theta: inf is not": lambda: Rope(theta=math.inf),
    "fraction: 1.5 of a head's channels": lambda: Rope(fraction=1.5),
    "factor: 0.0 is not": lambda: LinearScaling(factor=0.0),
    "low = 4.0 is not below high = 4.0": lambda: Llama3Scaling(factor=2.0, low=4.0),
    "original_context: 0 is not": lambda: Llama3Scaling(factor=2.0, original_context=0),
    "factor: -2.0 is not": lambda: LongRope(**{**LONG, "long": (-2.0,)}),
    "original_context: 1; expected": lambda: LongRope(**{**LONG, "original_context": 1}),
    "attention_factor: 0 is not": lambda: LongRope(**LONG, attention_factor=0),
    "factor: -4.0 is not": lambda: Yarn(factor=-4.0, original_context=8),
    "slow = 2.0 is above fast = 1.0": lambda: Yarn(factor=4.0, original_context=8, fast=1.0, slow=2.0),
    "position.theta: 1.0; with YaRN": lambda: Rope(theta=1.0, scaling=Yarn(factor=4.0, original_context=8)).frequencies(
        8
    ),
    "heads: 0 is not": lambda: Attention(**{**ATTENTION, "heads": 0}),
    "head_dim: 0 is not": lambda: Attention(**{**ATTENTION, "head_dim": 0}),
    "scale: 0.0 is not": lambda: Attention(**ATTENTION, scale=0.0),
    "head_dim: 0 of 8 channels are rotated": lambda: Attention(**{**ATTENTION, "position": Rope(fraction=0.1)}),
    "hidden: 0 is not": lambda: MLP(hidden=0),
    "hidden: -8 is not": lambda: GatedMLP(hidden=-8),
    "feeds: 0 is not": lambda: Bottleneck(
        mixer=Attention(**ATTENTION), mlp=MLP(hidden=8), norm=LayerNorm(), inner=8, feeds=0
    ),
    "softcap: -30 is not": lambda: Logits(softcap=-30),
    "initial.std: -0.02 is not": lambda: replace(tiny_llama(), initial=Normal(std=-0.02)),
    "model.types: -1 is negative": lambda: bert(layers=1, width=8, heads=1, hidden=8, vocab=8, context=8, types=-1),
}


@pytest.mark.parametrize("message", WRONG)
def test_numbers_that_mean_nothing_are_refused(message):
    with pytest.raises(UserError) as error:
        WRONG[message]()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
