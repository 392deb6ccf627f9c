"""Distillation and a preference loss in pieces, values and gradients, against torch in float64."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.client import reference_python

from slmjax.losses.next_token import cross_entropy
from slmjax.losses.pieces import token_values, weighted_means

B, T, D, V, CHUNK = 4, 10, 8, 50, 3

TORCH = """
import sys
import numpy as np
import torch
import torch.nn.functional as F

x = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
hidden, table, w = x["hidden"].requires_grad_(), x["table"].requires_grad_(), x["weights"]
logits = hidden @ table.T
teacher = x["other"] @ x["teacher"].T
nll = F.cross_entropy(logits.transpose(1, 2), x["targets"], reduction="none")
kl = F.kl_div(
    F.log_softmax(logits / 2, -1), F.log_softmax(teacher / 2, -1), reduction="none", log_target=True
).sum(-1)
distilled = (w * (0.25 * nll + 0.75 * 4 * kl)).sum() / w.sum()
margin = ((w > 0) * (-nll - x["reference"])).sum(1)
preferred = -F.logsigmoid(0.1 * (margin[::2] - margin[1::2])).mean()
out = {"kl": ((w * kl).sum() / w.sum()).detach()}
for name, loss in (("distilled", distilled), ("preferred", preferred)):
    by_hidden, by_table = torch.autograd.grad(loss, (hidden, table), retain_graph=True)
    out |= {name: loss.detach(), name + "/hidden": by_hidden, name + "/table": by_table}
np.savez(sys.argv[2], **{k: v.numpy() for k, v in out.items()})
"""


def arrays():
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(B, T, D)),
        "table": rng.normal(size=(V, D)),
        "other": rng.normal(size=(B, T, D + 2)),
        "teacher": rng.normal(size=(V, D + 2)),
        "targets": rng.integers(0, V, (B, T)),
        "weights": rng.random((B, T)) * (rng.random((B, T)) > 0.3),
        "reference": -5 * rng.random((B, T)),
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    np.savez(folder / "in.npz", **arrays())
    words = [reference_python(), "-c", TORCH, str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(words, check=True, timeout=300)
    with np.load(folder / "out.npz") as found:
        return dict(found)


def check(name, f, theirs):
    """f: (hidden, table) -> loss."""
    x = {k: jnp.asarray(v) for k, v in arrays().items()}
    (loss, more), (by_hidden, by_table) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(
        x["hidden"], x["table"]
    )
    assert loss.dtype == by_table.dtype == jnp.float64
    assert float(loss) == pytest.approx(float(theirs[name]), rel=1e-12)
    for got, wanted in ((by_hidden, theirs[f"{name}/hidden"]), (by_table, theirs[f"{name}/table"])):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-14)
    return more


def unembed(table, hidden):
    return hidden @ table.T


def test_distillation(theirs):
    """0.25 of cross-entropy, and 0.75 of 2^2 * KL at temperature 2 (Hinton et al. 2015, arXiv:1503.02531)."""
    with jax.enable_x64(True):
        x = {k: jnp.asarray(v) for k, v in arrays().items()}

        def per_token(logits, inputs):
            teacher = jax.nn.log_softmax(unembed(x["teacher"], inputs["other"]) / 2)
            kl = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits / 2)), axis=-1)
            return {"loss": cross_entropy(logits, inputs["targets"])["loss"], "kl": kl}

        def loss(hidden, table):
            return weighted_means(
                per_token, unembed, table, hidden, {name: x[name] for name in ("other", "targets")}, x["weights"],
                factors={"loss": 0.25, "kl": 0.75 * 4}, chunk=CHUNK,
            )  # fmt: skip

        metrics = check("distilled", loss, theirs)
        assert float(metrics["kl"]) == pytest.approx(float(theirs["kl"]), rel=1e-12)


def test_preference(theirs):
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7: rows 0, 2 are preferred to rows 1, 3."""
    with jax.enable_x64(True):
        x = {k: jnp.asarray(v) for k, v in arrays().items()}

        def loss(hidden, table):
            log_prob = lambda logits, targets: -cross_entropy(logits, targets)["loss"]  # noqa: E731
            found = token_values(log_prob, unembed, table, hidden, x["targets"], x["weights"], chunk=CHUNK)
            margin = jnp.sum(found - jnp.where(x["weights"] > 0, x["reference"], 0), axis=1)
            return -jnp.mean(jax.nn.log_sigmoid(0.1 * (margin[::2] - margin[1::2]))), ()

        check("preferred", loss, theirs)
