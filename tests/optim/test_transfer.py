"""Rules for other lengths, batches and sizes in closed form; the optimizer on the sphere against numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim.test_recipes import AXES, FLAT, SCHEDULE, VECTORS, as_tree, layers, params_like, train

from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.optim.hyperball import AdamH
from slmjax.optim.recipes import AdamW, Muon
from slmjax.optim.schedules import Cosine
from slmjax.optim.transfer import Horizon, Numbers, Ratios, Steps, Timescale, timescale
from slmjax.runs.transferring import transferred

pytestmark = pytest.mark.fast

BASE = Numbers(peak_lr=4e-3, weight_decay=0.1, eps=1e-8, b1=0.9, b2=0.95, warmup=0.1)


def test_four_times_the_steps():
    """Complete(d)P: only tokens over batch counts."""
    for ratios in (Ratios(tokens=4.0), Ratios(batch=0.25), Ratios(tokens=8.0, batch=2.0, params=3.0)):
        found = Steps()(BASE, BASE, ratios)
        assert found == pytest.approx(Numbers(2e-3, 0.05, 2e-8, 0.9**0.25, 0.95**0.25, 0.1))
    assert Steps()(BASE, BASE, Ratios(tokens=5.0, batch=5.0)) == BASE


def test_memories_last_for_the_same_share_of_a_run():
    """The half-life of Adam's averages, in steps over all steps, is unchanged."""
    found = Steps()(BASE, BASE, Ratios(tokens=3.0))
    for name in ("b1", "b2"):
        half_lives = [np.log(0.5) / np.log(getattr(x, name)) for x in (BASE, found)]
        assert half_lives[1] == pytest.approx(3 * half_lives[0])


def test_the_learning_rate_falls_with_the_horizon():
    assert Horizon()(BASE, BASE, Ratios(tokens=10.0)).peak_lr == pytest.approx(4e-3 * 10**-0.3)
    assert Horizon()(BASE, BASE, Ratios(tokens=10.0, batch=4.0)).peak_lr == pytest.approx(2 * 4e-3 * 10**-0.3)
    with pytest.raises(UserError, match=r"Horizon.power is -0.3; expected 0 to 1"):
        Horizon(power=-0.3)


@pytest.mark.parametrize("power", [-0.527, 0.0])
def test_the_weight_decay_follows_the_timescale(power):
    """Power Lines: tau of the run over tau of the base is (D/N over D0/N0)^power, whatever the learning rate did."""
    ratios, (n, d, b) = Ratios(tokens=30.0, batch=4.0, params=3.0), (1e6, 2e7, 1e4)
    now = Horizon()(BASE, BASE, ratios)
    found = Timescale(power=power)(now, BASE, ratios)
    before = timescale(peak_lr=BASE.peak_lr, weight_decay=BASE.weight_decay, tokens=d, batch=b)
    after = timescale(peak_lr=found.peak_lr, weight_decay=found.weight_decay, tokens=30 * d, batch=4 * b)
    assert after / before == pytest.approx((30 * d / (3 * n) / (d / n)) ** power)
    # for fixed N, D and learning rate the best weight decay is proportional to the batch
    assert Timescale()(BASE, BASE, Ratios(batch=4.0)).weight_decay == pytest.approx(0.4)


def test_numbers_may_be_traced():
    found = jax.jit(jax.vmap(lambda lr: Steps()(BASE._replace(peak_lr=lr), BASE, Ratios(tokens=4.0)).peak_lr))
    np.testing.assert_allclose(found(jnp.array([1.0, 2.0])), [0.5, 1.0])


def experiment(**changes):
    model = llama(layers=2, width=16, heads=2, kv_heads=1, hidden=32, vocab=61, context=64)
    data = PackedText(train=(Part(source="nowhere"),), batch=8, length=16)
    schedule = Cosine(peak_lr=4e-3, warmup_steps=10)
    return Experiment(**{"name": "x", "model": model, "data": data, "schedule": schedule, "steps": 100, **changes})


def test_an_experiment_takes_the_numbers_of_another():
    base = experiment(optimizer=AdamW(weight_decay=0.1))
    longer = experiment(steps=400, schedule=Cosine(peak_lr=1.0))
    found = transferred(longer, base)
    assert (found.steps, found.model, found.data) == (400, longer.model, longer.data)
    assert (found.schedule.peak_lr, found.schedule.warmup_steps) == (pytest.approx(2e-3), 40)
    assert found.optimizer.weight_decay == pytest.approx(0.05)
    assert found.optimizer.b2 == pytest.approx(0.95**0.25)
    wide = replace(longer, model=replace(longer.model, repeats=6))
    tokens, params = 4, parameter_count(wide.model) / parameter_count(base.model)
    decay = transferred(wide, base, (Timescale(),)).optimizer.weight_decay
    assert decay == pytest.approx(0.1 / tokens * (tokens / params) ** 0.527)
    assert transferred(base, base, (Horizon(), Timescale())) == base


def test_rules_for_adam_are_refused_elsewhere():
    base = experiment(optimizer=Muon())
    with pytest.raises(UserError, match=r"optimizer Muon: the rules Steps change .*; use AdamW, or rules"):
        transferred(replace(base, steps=200), base)
    assert transferred(replace(base, steps=200), base, (Horizon(),)).schedule.peak_lr == pytest.approx(4e-3 * 2**-0.3)


def adam_on_a_sphere(p, grads, lr, b1, b2, eps):
    """arXiv:2606.16899 in numpy, for one matrix."""
    m = v = np.zeros_like(p)
    radius = np.linalg.norm(p)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * radius * u / np.linalg.norm(u)
        p = radius * p / np.linalg.norm(p)
    return p


def adam(p, grads, lr, b1, b2, eps):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def test_adam_on_the_sphere():
    rng = np.random.default_rng(0)
    start, grads = params_like(rng), [params_like(rng) for _ in range(4)]
    found, _ = train(AdamH(clip_norm=None, adam_rate=0.3, not_hyperball=("layers/mlp/up",)), start, grads)
    for path in FLAT:
        under_adam = path in VECTORS | {"embed/table", "layers/mlp/up"}
        for i, p, gs in layers(path, start, grads):
            step, lr = (adam, 0.3 * 0.02) if under_adam else (adam_on_a_sphere, 0.02)
            want = step(p, gs, lr, 0.9, 0.95, 1e-8).reshape(found[path][i].shape)
            np.testing.assert_allclose(found[path][i], want, rtol=2e-5, atol=2e-5, err_msg=path)


def test_the_sphere_has_no_weight_decay_and_no_rule_for_the_width():
    with pytest.raises(UserError, match=r"optimizer.weight_decay is 0.1; AdamH fixes norms instead"):
        AdamH(weight_decay=0.1)
    with pytest.raises(UserError, match=r"optimizer AdamH: .* under muP"):
        AdamH().step_norms(AXES)
    state = AdamH().build(SCHEDULE.build(5), AXES).init(as_tree(params_like(np.random.default_rng(0))))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
