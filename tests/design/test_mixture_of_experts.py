"""A mixture of experts is one file, trained by `slmjax train`: nothing else of slmjax knows of experts.

docs/extend.md shows the file.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import VOCAB, batch, parameters, tiny_llama
from running import ROOT, slmjax

from slmjax import tree
from slmjax.experiment_file import load_module
from slmjax.losses.auxiliary import with_auxiliary
from slmjax.models.flops import active_count, flops_per_token, parameter_count
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.compute import Compute
from slmjax.nn.initial import Normal
from slmjax.nn.layer import Layer
from slmjax.nn.parts import Flow
from slmjax.objectives import NextToken
from slmjax.optim.recipes import Adafactor, AdamW, Muon
from slmjax.optim.schedules import Constant
from slmjax.track.jsonl import read
from slmjax.train import micro
from slmjax.types import Batch

FILE = ROOT / "tests" / "design" / "mixture_of_experts.py"
DATA = ROOT / ".cache" / "test-data"
MOE = load_module(FILE)
EXPERTS = MOE.Experts(experts=5, top=2, hidden=24, balance=0.1)
LLAMA = replace(tiny_llama(), pattern=(replace(tiny_llama().pattern[0], mlp=EXPERTS),))


def test_one_file_of_at_most_sixty_lines_that_slmjax_knows_nothing_of():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 60
    assert f"```python\n{text}```" in (ROOT / "docs" / "extend.md").read_text(), "docs/extend.md is out of step"
    assert not [p for p in (ROOT / "slmjax").rglob("*.py") if "Experts(" in p.read_text()]


def test_it_trains(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        done = slmjax(
            "train", FILE, "--runtime.workdir", tmp_path / "run", "--runtime.data-dir", DATA,
            "--runtime.tracking.wandb", "disabled", "--data.batch", 8, "--data.length", 32, "--steps", 30,
            "--schedule.warmup-steps", 3, "--evaluation.every", 30, "--evaluation.batches", 2, "--model.repeats", 2,
        )  # fmt: skip
    assert done.code == 0, done.err
    rows = list(read(tmp_path / "run" / "metrics.jsonl"))
    loss = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(loss[-5:]) < loss[0] - 1
    balance = [row["balance"] for row in rows if "balance" in row]
    assert len(balance) == 30
    assert np.all(np.asarray(balance) >= 2 * 0.01 * 0.95)  # of two layers, each at least about its factor


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.fast
def test_it_computes_the_chosen_experts_alone():
    """Token after token, expert after expert, in float64."""
    rng, ids = np.random.default_rng(0), np.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    x = rng.normal(size=(2, 6, 8))
    shapes = {"router": (8, 5), "gate": (5, 8, 24), "up": (5, 8, 24), "down": (5, 24, 8)}
    w = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    p, y, chosen = softmax(x @ w["router"]), np.zeros_like(x), np.zeros((2, 6, 5))
    for b, t in np.ndindex(2, 6):
        best = np.argsort(-p[b, t])[:2]
        chosen[b, t, best] = 1
        for e in best:
            gate = x[b, t] @ w["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (x[b, t] @ w["up"][e])
            y[b, t] += p[b, t, e] / p[b, t, best].sum() * (hidden @ w["down"][e])
    term = np.zeros((2, 6))
    for b, document in ((0, 1), (0, 2), (1, 1)):
        at = ids[b] == document
        term[b, at] = 0.1 * 5 / 2 * (chosen[b, at].mean(0) * p[b, at].mean(0)).sum()

    flow = Flow(None, Mask.of_rows(jnp.asarray(ids)), None, jnp.int32(0), {}, {"balance": jnp.zeros((2, 6))})
    layer = Layer(spec=EXPERTS, compute=Compute(), initial=Normal())
    params = jax.tree.map(jnp.float32, w)
    found, flow = layer.apply({"params": params}, jnp.float32(x), flow)
    np.testing.assert_allclose(found, y, atol=1e-5)
    np.testing.assert_allclose(np.asarray(flow.auxiliary["balance"])[ids > 0], term[ids > 0], rtol=1e-5)


def gradient(rows: Batch, pieces: int, decoder=LLAMA):
    """Metrics and gradient of the loss, as the step forms them."""
    model = decoder.build()
    objective, params = NextToken().build(model), parameters(decoder, model)

    def loss_and_grads(params, b, key):
        (loss, metrics), grads = jax.value_and_grad(lambda p: objective.loss(p, (), b, key), has_aux=True)(params)
        return {**metrics, "total": loss}, grads

    key = jax.random.key(0)
    return jax.jit(lambda p, b: micro.accumulated(loss_and_grads, p, b, key, pieces))(params, rows)


def alike(ours, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), ours, other)


@pytest.fixture(scope="module")
def uneven() -> Batch:
    """Four rows of two documents each, of which some end early in padding."""
    b = batch(rows=4, documents=2)
    ends = np.asarray([24, 20, 24, 5])[:, None]
    real = np.arange(24)[None] < ends
    return b._replace(weights=b.weights * real, segment_ids=jnp.where(real, b.segment_ids, 0))


@pytest.fixture(scope="module")
def whole(uneven):
    return gradient(uneven, 1)


def test_the_term_is_part_of_the_loss(whole):
    metrics, _ = whole
    assert metrics["balance"] > 0.1
    np.testing.assert_allclose(metrics["total"], metrics["loss"] + metrics["balance"], rtol=1e-6)


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_change_nothing(uneven, whole, pieces):
    alike(gradient(uneven, pieces), whole)


def test_packing_and_padding_change_nothing(uneven, whole):
    """Each document in a row of its own, with padding behind it."""

    def alone(x, fill=0):
        first, second = x[:, :12], x[:, 12:]
        return jnp.pad(jnp.concatenate([first, second]), ((0, 0), (0, 7)), constant_values=fill)

    rows = jax.tree.map(alone, uneven)
    alike(gradient(rows._replace(segment_ids=jnp.minimum(rows.segment_ids, 1)), 1), whole)


@pytest.mark.fast
def test_every_expert_is_decayed_and_orthogonalised_by_itself():
    axes = LLAMA.axes()
    decayed = tree.flatten(AdamW().decayed(axes))
    assert all(decayed[f"layers/mlp/{name}"] for name in ("router", "gate", "up", "down"))
    model = LLAMA.build()
    params = parameters(LLAMA, model)
    grads = jax.tree.map(lambda p: jnp.sin(100 * p), params)
    muon = Muon(weight_decay=0.0, clip_norm=None).build(Constant(peak_lr=1.0).build(3), axes)
    moved = muon.update(grads, muon.init(params), params)[0]["layers"]["mlp"]["gate"]
    assert moved.shape == (3, 5, 32, 24)
    s = np.linalg.svd(np.asarray(moved, np.float64), compute_uv=False) / (0.2 * np.sqrt(32))
    assert np.all((s > 0.3) & (s < 1.4))


@pytest.mark.fast
def test_adafactor_sees_every_expert_by_itself():
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(size=(2, 3, 8, 6)), jnp.float32) for _ in range(2))
    b, c = (jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32) for _ in range(2))
    spec, curve = Adafactor(min_factored=4, clip_norm=None), Constant(peak_lr=0.1).build(3)

    def moved(params, grads, axes):
        made = spec.build(curve, axes)
        return made.update(grads, made.init(params), params)[0]

    axes = {"w": ("layers", "experts", "embed", "mlp"), "b": ("layers", "experts", "mlp")}
    together = moved({"w": w, "b": b}, {"w": g, "b": c}, axes)
    for i, j in np.ndindex(2, 3):
        alone = moved({"w": w[i, j], "b": b[i, j]}, {"w": g[i, j], "b": c[i, j]}, {"w": axes["w"][2:], "b": ("mlp",)})
        np.testing.assert_allclose(together["w"][i, j], alone["w"], rtol=1e-5)
        np.testing.assert_allclose(together["b"][i, j], alone["b"], rtol=1e-5)


@pytest.mark.fast
def test_flops_count_the_experts_that_a_token_uses():
    """Three layers of five experts of which two compute a token: as if there were two."""
    two = replace(LLAMA, pattern=(replace(LLAMA.pattern[0], mlp=replace(EXPERTS, experts=2)),))
    router = 3 * 32 * (5 - 2)
    assert active_count(LLAMA) == parameter_count(two) + router
    assert parameter_count(LLAMA) - active_count(LLAMA) == 3 * 3 * (3 * 32 * 24)
    ours, theirs = flops_per_token(LLAMA, 24), flops_per_token(two, 24)
    assert [a - b for a, b in zip(ours, theirs, strict=True)] == [6 * router] * 4
    assert flops_per_token(LLAMA, 24).head - flops_per_token(LLAMA, 24).nonembedding == 6 * VOCAB * 32


@pytest.mark.fast
def test_terms_are_named_and_none_hides_a_metric():
    weights = jnp.asarray([[1.0, 0.0], [3.0, 0.0]])
    term = jnp.asarray([[2.0, jnp.nan], [4.0, jnp.inf]])
    loss, metrics = with_auxiliary(jnp.float32(1), {"loss": 1.0}, {"router": term}, weights)
    assert loss == 1 + (2 + 3 * 4) / 4
    assert metrics == {"loss": 1.0, "router": 3.5}
    with pytest.raises(Exception, match="auxiliary: 'loss' is the name of a metric"):
        with_auxiliary(loss, metrics, {"loss": term}, weights)
    flow = Flow(None, Mask.of_rows(jnp.ones((1, 2), jnp.int32)), None, jnp.int32(0), {}, {"balance": term[:1]})
    with pytest.raises(Exception, match=r"adds 'z', which no part declares \(declared: balance\)"):
        flow.adding("z", term[:1])
