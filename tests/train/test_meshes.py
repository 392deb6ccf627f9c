"""A real decoder on 8 simulated devices: every mesh gives the loss of one device."""

import functools

import jax
import numpy as np
import pytest

from slmjax import tree
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW, Muon
from slmjax.optim.schedules import Cosine
from slmjax.train.guard import Skip
from slmjax.train.sharding import Mesh
from slmjax.train.step import program
from slmjax.types import Batch
from slmjax.views import EMA

LLAMA = llama(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocab=64, context=16)
GPT2 = gpt2(layers=2, width=32, heads=4, vocab=64, context=16)
STEPS = 4


def batch(i):
    """8 rows of 16 tokens, each of two documents, with an uneven number of masked ones."""
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, 64, (8, 17), dtype=np.int32)
    cut = rng.integers(2, 15, (8, 1))
    places = np.arange(16, dtype=np.int32)
    segments = np.where(places < cut, 1, 2).astype(np.int32)
    positions = np.where(places < cut, places, places - cut).astype(np.int32)
    weights = (rng.random((8, 16)) < rng.random((8, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)


def train(decoder, recipe, mesh, devices, accumulate, micro_tokens=None):
    model = decoder.build()
    schedule = Cosine(peak_lr=3e-3, warmup_steps=2).build(100)
    objective, optimizer = NextToken(z_loss=1e-4).build(model), recipe.build(schedule, model.axes)
    run = program(
        model.init, model.axes, objective, optimizer, EMA(decay=0.9).build(model.axes),
        mesh=mesh.build(devices), accumulate=accumulate, micro_tokens=micro_tokens,
        guard=Skip(), schedule=schedule,
    )  # fmt: skip
    state, rows = run.init(), []
    for i in range(STEPS):
        state, metrics = run.step(state, (), run.put(batch(i)))
        rows.append(jax.device_get(metrics))
    return run, state, rows


@pytest.fixture(scope="module")
def one_device():
    """(decoder, recipe) -> the metrics of one device, computed once."""
    return functools.cache(lambda decoder, recipe: train(decoder, recipe, Mesh(), jax.devices()[:1], 1)[2])


@pytest.mark.parametrize(
    ("decoder", "recipe", "mesh", "accumulate", "micro_tokens"),
    [
        (LLAMA, AdamW(), Mesh(data=8), 1, None),
        (LLAMA, AdamW(), Mesh(data=2, fsdp=4), 1, None),
        (LLAMA, AdamW(), Mesh(data=2, fsdp=2, tensor=2), 1, 16),
        (LLAMA, AdamW(), Mesh(data=1, tensor=8), 1, None),  # 4 heads over 8 devices: whole; the rest is split
        (LLAMA, Muon(), Mesh(data=2, fsdp=2, tensor=2), 2, None),
        (GPT2, AdamW(), Mesh(data=2, fsdp=2, tensor=2), 2, None),
    ],
    ids=["data", "fsdp", "all", "tensor", "muon", "gpt2"],
)
def test_every_mesh_gives_the_loss_of_one_device(one_device, decoder, recipe, mesh, accumulate, micro_tokens):
    expected = one_device(decoder, recipe)
    run, state, got = train(decoder, recipe, mesh, jax.devices(), accumulate, micro_tokens)
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-6, err_msg=f"{name} of step {step}")
    for path, x in tree.flatten(state).items():
        assert x.sharding.is_equivalent_to(tree.flatten(run.abstract)[path].sharding, x.ndim), path
    assert run.step.compiled == 1


def test_parameters_and_their_optimizer_state_are_split():
    """Over fsdp=2 x tensor=2 a device holds little more than a quarter of all."""
    model = LLAMA.build()
    schedule = Cosine(peak_lr=1e-3, warmup_steps=2).build(10)
    run = program(
        model.init, model.axes, NextToken().build(model), AdamW().build(schedule, model.axes),
        EMA(decay=0.9).build(model.axes), mesh=Mesh(data=2, fsdp=2, tensor=2).build(), schedule=schedule,
    )  # fmt: skip
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.init()))
    assert held < 0.3 * tree.nbytes(run.abstract)
