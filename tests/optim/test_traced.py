"""Several runs in one program: `jax.vmap` over seeds, learning rates, weight decays, betas and initial values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.test_one_step import packed

from slmjax.models.families.llama import llama
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW, Lion, Muon
from slmjax.optim.schedules import WSD, Cosine
from slmjax.train.state import init_state
from slmjax.train.step import SKIP, make_step
from slmjax.types import Group
from slmjax.views import Identity

pytestmark = pytest.mark.fast

DECODER = llama(layers=2, width=16, heads=2, kv_heads=1, hidden=24, vocab=31, context=32)
STEPS = 3


@pytest.mark.parametrize(
    ("optimizer", "schedule", "beta"),
    [
        (AdamW(), Cosine(peak_lr=1e-3, warmup_steps=1), "b2"),
        (Lion(), WSD(peak_lr=1e-3, decay_fraction=0.5), "b1"),
        (Muon(), Cosine(peak_lr=1e-3), "momentum"),
    ],
    ids=["adamw", "lion", "muon"],
)
def test_a_population_is_its_runs_one_by_one(optimizer, schedule, beta):
    batch = jax.tree.map(jnp.asarray, packed(DECODER.vocab))

    def run(seed, lr, decay, momentum, std):
        model = replace(DECODER, initial=replace(DECODER.initial, std=std)).build()
        recipe = replace(optimizer, weight_decay=decay, **{beta: momentum})
        tx = recipe.build(replace(schedule, peak_lr=lr).build(STEPS), model.axes)
        key = jax.random.key(seed)
        view = Identity().build(model.axes)
        step = make_step(NextToken().build(model), tx, view, jax.random.fold_in(key, 1))
        state = init_state(model.init, tx, view, SKIP, jax.random.fold_in(key, 0))
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, (), batch)
            losses.append(metrics["loss"])
        return jnp.stack(losses), state.params["layers"]["mlp"]["up"]

    values = (
        jnp.array([0, 0, 7]), jnp.array([1e-2, 3e-3, 1e-2]), jnp.array([0.0, 0.5, 0.1]), jnp.array([0.8, 0.9, 0.95]),
        jnp.array([0.02, 0.02, 0.1]),
    )  # fmt: skip
    together = jax.jit(jax.vmap(run))(*values)
    for i in range(3):
        alone = run(*(v[i].item() for v in values))
        np.testing.assert_allclose(together[0][i], alone[0], rtol=2e-5)
        np.testing.assert_allclose(together[1][i], alone[1], rtol=1e-3, atol=2e-5)
    assert len({float(x) for x in together[0][:, -1]}) == 3


def test_a_group_has_a_learning_rate_and_a_weight_decay_of_its_own():
    params = {"w": jnp.ones((2, 2)), "view": {"scale": jnp.full(3, 2.0), "bias": jnp.ones(1)}}
    axes = {"w": ("embed", "mlp"), "view": {"scale": (None,), "bias": (None,)}}
    groups = {"view/scale": Group(rate=0.1, weight_decay=0.5), "view/bias": Group()}
    lr, decay = 0.01, 0.2
    tx = AdamW(weight_decay=decay, clip_norm=None).build(lambda step: lr, axes, groups)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    # The first step of Adam goes by 1 in each coordinate.
    np.testing.assert_allclose(updates["w"], -lr * (1 + decay * 1), rtol=1e-5)
    np.testing.assert_allclose(updates["view"]["scale"], -lr * 0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["view"]["bias"], -lr, rtol=1e-5)
