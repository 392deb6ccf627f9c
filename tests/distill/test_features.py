"""Losses between what two models compute inside: values and gradients against torch in float64, by document."""

import functools
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance.test_invariance import QUICK
from reference.client import reference_python

from slmjax.distill.features import HiddenCosine, HiddenMSE, Seen
from slmjax.distill.layer_maps import Embedding, Last
from slmjax.distill.relations import AttentionKL, AttentionScores, Relations
from slmjax.distill.similarity import CKA, PairAngles, PairDistances
from slmjax.nn.attention_kernels import Scores
from slmjax.types import Output

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2, 2]], np.int32)
ALL = {
    "embedding": (HiddenMSE(layers=Embedding(), teacher_width=5), (0, 0), False),
    "hidden": (HiddenMSE(layers=Last(), teacher_width=5), (2, 3), False),
    "cosine": (HiddenCosine(layers=Last(), teacher_width=5), (2, 3), False),
    "scores": (AttentionScores(), (1, 2), False),
    "attention": (AttentionKL(), (2, 3), False),
    "causal attention": (AttentionKL(), (1, 2), True),
    "value relation": (Relations(queries=0.0, keys=0.0), (2, 3), False),
    "relations": (Relations(queries=2.0, heads=2), (1, 2), False),
    "causal relations": (Relations(values=0.5, heads=2), (1, 1), True),
    "cka": (CKA(), (1, 2), False),
    "distances": (PairDistances(), (2, 3), False),
    "angles": (PairAngles(), (1, 1), False),
}

TORCH = """
import sys
import numpy as np
import torch
import torch.nn.functional as F

x = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
student = {k: v.requires_grad_() for k, v in x.items() if k.startswith("s_") or k == "projection"}
segments, out = x["segments"], {}


def hidden(who, layer, row, at):
    return x[who + "_hidden"][layer, row][at]


def scores(who, layer, row, at):
    q, k = (x[f"{who}_{n}"][layer - 1, row][at].transpose(0, 1) for n in "qk")
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    return q @ k.transpose(1, 2) / q.shape[-1] ** 0.5


def kl(teacher, student):  # one value a row
    if causal:
        hide = torch.ones(teacher.shape[-2:]).triu(1).bool()
        teacher, student = (s.masked_fill(hide, float("-inf")) for s in (teacher, student))
    p, q = torch.softmax(teacher, -1), torch.log_softmax(student, -1)
    return torch.where(p > 0, p * (torch.log(p) - q), 0.0).sum(-1).mean(0)


def relation(who, name, layer, row, at, heads):
    v = x[f"{who}_{name}"][layer - 1, row][at]
    if heads:
        v = v.flatten(1).unflatten(1, (heads, -1))
    v = v.transpose(0, 1)
    return v @ v.transpose(1, 2) / v.shape[-1] ** 0.5


def relations(pair, row, at, names, heads):
    return sum(f * kl(*(relation(w, n, m, row, at, heads) for w, m in zip("ts", pair[::-1]))) for n, f in names.items())


def tinybert(pair, row, at):
    ours, theirs = (scores(w, m, row, at) for w, m in zip("st", pair))
    ours, theirs = (torch.where(s <= -1e2, torch.zeros_like(s), s) for s in (ours, theirs))
    return F.mse_loss(ours, theirs, reduction="none").mean((0, 2))


def cka(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return 1 - torch.linalg.norm(b.T @ a) ** 2 / (torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b))


def distances(a, b):
    a, b = F.pdist(a), F.pdist(b)
    return F.smooth_l1_loss(a / a.mean(), b / b.mean())


def angles(a, b):
    both = []
    for z in (a, b):
        e = F.normalize(z.unsqueeze(0) - z.unsqueeze(1), p=2, dim=2)
        both.append(torch.bmm(e, e.transpose(1, 2)))
    n = torch.arange(len(a))
    j, i, k = (n.view(s) for s in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    different = ((i != j) & (j != k) & (i != k)).expand_as(both[0])
    return F.smooth_l1_loss(both[0], both[1], reduction="none")[different].mean()


def compared(f, least):
    def values(pair, row, at):
        n = int(at.sum())
        a, b = (hidden(w, m, row, at) for w, m in zip("st", pair))
        return f(a, b).expand(n) if n >= least else torch.zeros(n, dtype=torch.float64)

    return values


def projected(pair, row, at):
    return hidden("s", pair[0], row, at) @ x["projection"], hidden("t", pair[1], row, at)


def mse(*where):
    return F.mse_loss(*projected(*where), reduction="none").mean(1)


def cosine(*where):
    a, b = projected(*where)
    return F.cosine_embedding_loss(a, b, torch.ones(len(a)), reduction="none")


attention = lambda pair, row, at: kl(scores("t", pair[1], row, at), scores("s", pair[0], row, at))
losses = {
    "embedding": mse, "hidden": mse, "cosine": cosine, "scores": tinybert, "attention": attention,
    "causal attention": attention,
    "value relation": lambda *w: relations(*w, {"v": 1}, None),
    "relations": lambda *w: relations(*w, {"q": 2, "k": 1, "v": 1}, 2),
    "causal relations": lambda *w: relations(*w, {"q": 1, "k": 1, "v": 0.5}, 2),
    "cka": compared(cka, 2), "distances": compared(distances, 2), "angles": compared(angles, 3),
}
for name, loss in losses.items():
    causal, pair = name.startswith("causal"), x["pairs/" + name].tolist()
    values = torch.zeros(segments.shape, dtype=torch.float64)
    for row in range(len(segments)):
        for number in range(1, int(segments[row].max()) + 1):
            at = segments[row] == number
            values[row] = values[row].masked_scatter(at, loss(pair, row, at))
    gradients = torch.autograd.grad((values * x["cotangent"]).sum(), student.values(), allow_unused=True)
    out[name] = values.detach().numpy()
    out |= {f"{name}/{k}": g.numpy() for k, g in zip(student, gradients) if g is not None}
np.savez(sys.argv[2], **out)
"""


def arrays():
    rng = np.random.default_rng(0)
    b, t = SEGMENTS.shape
    found = {"projection": rng.normal(size=(4, 5)), "cotangent": rng.normal(size=(b, t)), "segments": SEGMENTS}
    for who, layers, width, head_dim in (("s", 2, 4, 3), ("t", 3, 5, 5)):
        found[f"{who}_hidden"] = rng.normal(size=(layers + 1, b, t, width))
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            found[f"{who}_{name}"] = rng.normal(size=(layers, b, t, heads, head_dim))
    found["s_q"][0, :, :, 0] *= 100.0  # scores below -100, which count as 0
    return found | {f"pairs/{name}": np.array(pair) for name, (_, pair, _) in ALL.items()}


def seen(hidden, q, k, v, causal=False):
    attention = tuple({"q": q[i], "k": k[i], "v": v[i]} for i in range(len(q)))
    rule = Scores(scale=q.shape[-1] ** -0.5, causal=causal)
    return Seen(Output(hidden=hidden[-1], blocks=hidden, attention=attention), (rule,) * len(q))


def of(x, who, causal=False):
    return seen(*(x[f"{who}_{name}"] for name in ("hidden", "q", "k", "v")), causal)


STUDENT = ("s_hidden", "s_q", "s_k", "s_v", "projection")


def measured(loss, pair, causal, x, *teachers):
    """For each of the teachers' arrays: values [B, T], and the gradients of their products with `cotangent`."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(student, x):
        def values(student):
            own = {"projection": student["projection"]}
            found = loss(of(student, "s", causal), of(x, "t", causal), pair, x["segments"], own)
            found = jnp.where(x["segments"] > 0, found, 0.0)
            return (found * x["cotangent"]).sum(), found

        gradients, found = jax.grad(values, has_aux=True)(student)
        return found, gradients

    with jax.enable_x64(True):
        student = {k: x[k] for k in STUDENT}
        return [jax.device_get(f(student, x | teacher)) for teacher in teachers]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    np.savez(folder / "in.npz", **arrays())
    words = [reference_python(), "-c", TORCH, str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(words, check=True, timeout=300)
    with np.load(folder / "out.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", ALL)
def test_agrees_with_torch(name, theirs):
    ((value, gradients),) = measured(*ALL[name], arrays(), {})
    np.testing.assert_allclose(value, theirs[name], rtol=1e-9, atol=1e-10)
    assert np.abs(value).max() > 1e-3
    for path, gradient in gradients.items():
        wanted = theirs.get(f"{name}/{path}", np.zeros(gradient.shape))
        np.testing.assert_allclose(gradient, wanted, rtol=1e-7, atol=1e-10, err_msg=path)
    assert any(np.abs(g).max() > 1e-3 for g in gradients.values())


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_is_zero_for_equal_models_and_sees_a_shift_by_one_token(name):
    loss, (number, _), causal = ALL[name]
    loss = replace(loss, teacher_width=None) if loss.trains else loss
    x = {k: v for k, v in arrays().items() if not k.startswith(("t_", "pairs/"))} | {"cotangent": np.ones((2, 8))}
    same = {"t" + k[1:]: x[k] for k in STUDENT[:4]}
    shifted = {k: np.roll(v, 1, axis=2) for k, v in same.items()}
    (value, gradients), (moved, _) = measured(loss, (number, number), causal, x, same, shifted)
    assert np.abs(value).max() < 1e-12
    assert all(np.abs(g).max() < 1e-7 for g in gradients.values())
    assert moved.sum() > 0.1
