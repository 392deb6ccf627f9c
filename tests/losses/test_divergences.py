"""Divergences: values and gradients against torch in float64, and what they are where a probability is 0."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.client import reference_python

from slmjax.distill.teacher import average
from slmjax.errors import UserError
from slmjax.losses.divergences import JSD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation, mixture

ALL = {
    "forward": ForwardKL(),
    "reverse": ReverseKL(),
    "jsd": JSD(beta=0.5),
    "jsd .1": JSD(beta=0.1),
    "tvd": TotalVariation(),
    "skew": SkewKL(alpha=0.1),
    "skew reverse": SkewReverseKL(alpha=0.1),
}

TORCH = """
import sys
import numpy as np
import torch
from torch.distributions import Categorical, kl_divergence

x = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
student = x["student"].requires_grad_()
p, q = torch.softmax(x["teacher"], -1), torch.softmax(student, -1)


def kl(a, b):
    return kl_divergence(Categorical(probs=a), Categorical(probs=b))


def jsd(beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


losses = {
    "forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd(0.5), "jsd .1": jsd(0.1), "tvd": 0.5 * (p - q).abs().sum(-1),
    "skew": kl(p, 0.1 * p + 0.9 * q), "skew reverse": kl(q, 0.9 * p + 0.1 * q),
}
out = {}
for name, loss in losses.items():
    (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    out |= {name: loss.detach().numpy(), name + "/gradient": gradient.numpy()}
np.savez(sys.argv[2], **out)
"""


def logits(seed, shape=(5, 7, 11)):
    return 3 * np.random.default_rng(seed).normal(size=shape)


def measured(divergence, teacher, student):
    """Values and gradients by the student's logits, in float64; the same of log-probabilities and of logits."""
    with jax.enable_x64(True):
        teacher, student = jnp.asarray(teacher, jnp.float64), jnp.asarray(student, jnp.float64)
        forms = (
            lambda z: divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(z)),
            lambda z: divergence.of_logits(teacher, z, (teacher.max(-1), jax.lax.stop_gradient(z.max(-1)))),
        )
        one, other = [(np.asarray(f(student)), np.asarray(jax.grad(lambda z: f(z).sum())(student))) for f in forms]  # noqa: B023
    np.testing.assert_allclose(one[0], other[0], rtol=1e-12, atol=1e-14)
    if np.isfinite(one[0]).all():
        np.testing.assert_allclose(one[1], other[1], rtol=1e-10, atol=1e-14)
    return other


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    np.savez(folder / "in.npz", teacher=logits(0), student=logits(1))
    words = [reference_python(), "-c", TORCH, str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(words, check=True, timeout=300)
    with np.load(folder / "out.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", ALL)
def test_agrees_with_torch(name, theirs):
    value, gradient = measured(ALL[name], logits(0), logits(1))
    np.testing.assert_allclose(value, theirs[name], rtol=1e-6, atol=1e-7)  # torch clamps probabilities at its epsilon
    np.testing.assert_allclose(gradient, theirs[f"{name}/gradient"], rtol=1e-6, atol=1e-7)


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_is_zero_exactly_where_the_two_agree(name):
    value, gradient = measured(ALL[name], logits(0), logits(0) + 5)
    np.testing.assert_allclose(value, 0, atol=1e-14)
    if name != "tvd":  # which has a kink there
        np.testing.assert_allclose(gradient, 0, atol=1e-14)
    assert measured(ALL[name], logits(0), logits(1))[0].min() > 1e-3


@pytest.mark.fast
def test_only_the_jensen_shannon_divergence_at_one_half_is_symmetric():
    for name, divergence in ALL.items():
        one, other = measured(divergence, logits(0), logits(1))[0], measured(divergence, logits(1), logits(0))[0]
        assert np.allclose(one, other) == (name in ("jsd", "tvd")), name


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("who", ["teacher", "both"])
def test_tokens_without_probability_give_no_nan(name, who):
    """Their share of the value is that of a distribution over the other tokens alone."""
    teacher, student = logits(0), logits(1)
    teacher[..., [2, 9]] = -np.inf
    if who == "both":
        student[..., [2, 9]] = -np.inf
    value, gradient = measured(ALL[name], teacher, student)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    if who == "both":
        rest = np.delete(np.arange(11), [2, 9])
        fewer, by_rest = measured(ALL[name], teacher[..., rest], student[..., rest])
        np.testing.assert_allclose(value, fewer, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(gradient[..., rest], by_rest, rtol=1e-10, atol=1e-13)
        assert not gradient[..., [2, 9]].any()
    else:
        assert (gradient[..., [2, 9]] > 0).all(), "the student is driven away from tokens that do not exist"


@pytest.mark.fast
def test_the_forward_divergence_counts_what_the_student_gives_to_excluded_tokens():
    teacher, student = logits(0), logits(1)
    teacher[..., 4] = -np.inf
    rest = np.delete(np.arange(11), 4)
    mass = np.exp(student[..., rest]).sum(-1) / np.exp(student).sum(-1)
    for divergence in (ForwardKL(), ReverseKL()):
        within = measured(divergence, teacher[..., rest], student[..., rest])[0]
        np.testing.assert_allclose(measured(divergence, teacher, student)[0], within - np.log(mass), rtol=1e-12)


@pytest.mark.fast
def test_a_student_that_excludes_what_the_teacher_allows_is_infinitely_far_but_only_where_the_definition_says_so():
    teacher, student = logits(0), logits(1)
    student[..., 3] = -np.inf
    values = {name: measured(divergence, teacher, student)[0] for name, divergence in ALL.items()}
    assert np.isposinf(values.pop("forward")).all()
    for name, value in values.items():
        assert np.isfinite(value).all(), name
    assert (values["skew"] < -np.log(0.1)).all()


@pytest.mark.fast
def test_a_mixture_of_distributions():
    with jax.enable_x64(True):
        p, q = jax.nn.log_softmax(jnp.asarray(logits(0))), jax.nn.log_softmax(jnp.asarray(logits(1)))
        np.testing.assert_allclose(jnp.exp(mixture(p, q, 0.3)), 0.3 * np.exp(p) + 0.7 * np.exp(q), rtol=1e-12)
        nothing = jnp.full(3, -jnp.inf)
        assert np.isneginf(mixture(nothing, nothing, 0.3)).all()
        assert not np.isnan(jax.grad(lambda a: jnp.exp(mixture(a, nothing, 0.3)).sum())(nothing)).any()


@pytest.mark.fast
def test_probabilities_of_teachers_are_averaged_and_not_their_logits():
    one, other = logits(2, (3, 11)), logits(3, (3, 13))
    with jax.enable_x64(True):
        found = average([jnp.asarray(one), jnp.asarray(other)], temperature=2.0, outputs=12, tokens=10)
    mean = sum(np.exp(z[:, :10] / 2) / np.exp(z[:, :10] / 2).sum(-1, keepdims=True) for z in (one, other)) / 2
    np.testing.assert_allclose(np.exp(found[:, :10]), mean, rtol=1e-12)
    assert np.isneginf(found[:, 10:]).all()


@pytest.mark.fast
@pytest.mark.parametrize("rows", [12, 16, 20])
def test_rows_beyond_the_tokenizer_are_no_tokens_however_many_a_teacher_has(rows):
    """152,064 rows against 151,936 tokens: the ids count."""
    z = logits(4, (3, 12))
    padded = np.concatenate([z, np.full((3, rows - 12), 50.0)], axis=1)
    with jax.enable_x64(True):
        found = average([jnp.asarray(padded)], temperature=1.0, outputs=16, tokens=12)
        np.testing.assert_allclose(found[:, :12], jax.nn.log_softmax(jnp.asarray(z)), rtol=1e-12)
    assert found.shape == (3, 16)
    assert np.isneginf(found[:, 12:]).all()


@pytest.mark.fast
@pytest.mark.parametrize("make", [lambda: JSD(beta=0.0), lambda: JSD(beta=1.0), lambda: SkewKL(alpha=1.0)])
def test_a_mixture_at_its_end_is_refused_with_what_to_use(make):
    with pytest.raises(UserError, match="KL"):
        make()
