"""Sparse targets: what is kept, that draws are unbiased and top-k is not, and the gradient of the tail."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slmjax.data.columns import Draws, Halves, Ids, LogProbs
from slmjax.data.teacher_targets import TeacherTargets
from slmjax.distill.offline import DistillOffline
from slmjax.distill.source import read_by_unembed
from slmjax.distill.stored import Sampled, Tail, TopK, calibration_error, errors, listed, normalised
from slmjax.errors import UserError
from slmjax.losses.divergences import JSD, ForwardKL, ReverseKL, TotalVariation
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute

V = 12
RNG = np.random.default_rng(0)
TEACHER = jax.nn.log_softmax(jnp.asarray(2 * RNG.normal(size=V), jnp.float32))
STUDENT = jnp.asarray(RNG.normal(size=V), jnp.float32)


def kept(kind, log_probs, seed=0):
    """[n, V] -> decoded ids and log-probabilities, as a batch gets them from disk."""
    keys = jax.random.split(jax.random.key(seed), len(log_probs))
    values = jax.jit(kind.values)(jnp.asarray(log_probs), jnp.zeros((len(log_probs), 1)), keys)
    read = {}
    for name, column in kind.columns(log_probs.shape[1], 1).items():
        read |= column.decode(column.encode(values[name]))
    return read["ids"], read["log_probs"]


def gradients(ids, log_probs, divergence=None, renormalise=True):
    """The gradient of the divergence in the student's logits, for each stored prediction: [n, V]."""

    def value(logits, ids, log_probs):
        theirs = normalised(log_probs) if renormalise else log_probs
        return (divergence or ForwardKL())(theirs, listed(ids, jax.nn.log_softmax(logits)))

    return np.asarray(jax.jit(jax.vmap(jax.grad(value), (None, 0, 0)))(STUDENT, ids, log_probs), np.float64)


DENSE = np.asarray(jax.nn.softmax(STUDENT) - jnp.exp(TEACHER), np.float64)


def unbiased(found):
    """Whether the mean of n gradients [n, V] is within 3 standard errors of the dense one in every coordinate."""
    error = found.std(axis=0, ddof=1) / len(found) ** 0.5
    return bool(np.all(np.abs(found.mean(axis=0) - DENSE) <= 3 * error + 1e-6))


def test_the_mean_gradient_of_draws_is_the_dense_one_and_that_of_top_k_is_not():
    many = np.tile(np.asarray(TEACHER), (10_000, 1))
    found = gradients(*kept(Sampled(draws=4), many))
    assert unbiased(found)
    assert found.std(axis=0).max() > 0.05, "single draws differ"
    for renormalise in (True, False):
        assert not unbiased(gradients(*kept(TopK(k=4), many[:100]), renormalise=renormalise))
    independent = -np.eye(V)[
        RNG.choice(V, (10_000, 4), p=np.exp(np.float64(TEACHER)) / np.exp(np.float64(TEACHER)).sum())
    ]
    spread = (independent.mean(axis=1) + np.asarray(jax.nn.softmax(STUDENT))).var(axis=0)
    assert found.var(axis=0).sum() < spread.sum(), "stratified draws vary less than independent ones"


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(beta=0.3), TotalVariation()])
@pytest.mark.parametrize("kind", [TopK(k=V), Tail(k=V)])
def test_all_tokens_are_the_dense_divergence(kind, divergence):
    ids = jnp.asarray(kept(kind, TEACHER[None])[0][0])
    exact = jnp.where(ids < 0, -jnp.inf, TEACHER[jnp.maximum(ids, 0)])  # without the rounding to bfloat16
    f = lambda z: divergence(exact, listed(ids, jax.nn.log_softmax(z)))  # noqa: E731
    dense = lambda z: divergence(TEACHER, jax.nn.log_softmax(z))  # noqa: E731
    value, gradient = jax.value_and_grad(f)(STUDENT)
    wanted, theirs = jax.value_and_grad(dense)(STUDENT)
    assert value == pytest.approx(float(wanted), abs=2e-6)
    np.testing.assert_allclose(gradient, theirs, atol=2e-6)


def test_the_tail_has_the_gradient_of_the_closed_form():
    """KL over the listed tokens and the sum of the others; d/dz = q - p on the listed ones and (1 - sum p) q / (1 - sum
    q) less on the others, in float64."""
    with jax.enable_x64(True):
        p, z = np.exp(np.float64(TEACHER)), np.float64(STUDENT)
        p, q = p / p.sum(), np.exp(z) / np.exp(z).sum()
        ids = np.array([3, 7, 1, -1])
        real = ids[:3]
        theirs = np.log(np.append(p[real], 1 - p[real].sum()))
        f = lambda z: ForwardKL()(jnp.asarray(theirs), listed(jnp.asarray(ids), jax.nn.log_softmax(z)))  # noqa: E731
        value, gradient = jax.value_and_grad(f)(jnp.asarray(z))
        mine = np.log(np.append(q[real], 1 - q[real].sum()))
        assert value == pytest.approx(float((np.exp(theirs) * (theirs - mine)).sum()), rel=1e-12)
        wanted = q * (1 - (1 - p[real].sum()) / (1 - q[real].sum()))
        wanted[real] = 0
        others = np.setdiff1d(np.arange(V), real)
        wanted[real] = q[real] - p[real]
        np.testing.assert_allclose(gradient[real], wanted[real], atol=1e-12)
        np.testing.assert_allclose(gradient[others], wanted[others], atol=1e-12)
        sure = jnp.where(jnp.isin(jnp.arange(V), real), 60.0, -60.0)  # the student leaves nothing: only it is clamped
        value, gradient = jax.value_and_grad(f)(sure)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_truncated_top_k_may_be_negative_and_renormalised_is_not():
    ids, log_probs = (jnp.asarray(x[0]) for x in kept(TopK(k=2), TEACHER[None]))
    close = jax.nn.log_softmax(jnp.zeros(V).at[ids].set(5.0))
    assert ForwardKL()(log_probs, listed(ids, close)) < 0
    assert ForwardKL()(normalised(log_probs), listed(ids, close)) > 0


def test_columns_keep_what_they_are_given():
    ids = RNG.integers(0, 1 << 16, (50, 7))
    np.testing.assert_array_equal(
        Ids(width=7, dtype="uint16").decode(Ids(width=7, dtype="uint16").encode(ids))["ids"], ids
    )
    with_rest = Ids(width=7, dtype="uint32", rest=True)
    np.testing.assert_array_equal(with_rest.decode(with_rest.encode(ids + 70_000))["ids"][:, :-1], ids + 70_000)
    log_probs = np.float32(np.sort(-RNG.exponential(4, (50, 7)))[:, ::-1])
    log_probs[0, -2:] = -np.inf
    column = LogProbs(width=7)
    expected = log_probs.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(column.decode(column.encode(log_probs))["log_probs"], expected)
    draws = np.sort(RNG.integers(0, 5, (50, 8)) * 20_000)
    column = Draws(width=8, dtype="uint32")
    read = column.decode(column.encode(draws))
    np.testing.assert_array_equal(read["ids"], draws)
    for row, ids, shares in zip(draws, read["ids"], np.exp(read["log_probs"]), strict=True):
        values, counts = np.unique(row, return_counts=True)
        live = shares > 0
        np.testing.assert_array_equal(ids[live], values)
        np.testing.assert_allclose(shares[live], counts / 8, rtol=1e-6)
    for dtype in ("bfloat16", "float16"):
        column = Halves(width=7, dtype=dtype)
        np.testing.assert_allclose(
            np.float32(column.decode(column.encode(log_probs[1:]))["hidden"]), log_probs[1:], rtol=4e-3
        )
    with pytest.raises(UserError, match="float16 cannot represent"):
        Halves(width=1, dtype="float16").encode(np.array([[1e6]]))


def test_tokens_of_probability_0_are_never_drawn():
    log_probs = np.where(np.arange(V) % 3 == 0, np.asarray(TEACHER), -np.inf)
    log_probs -= np.log(np.exp(log_probs).sum())
    ids, _ = kept(Sampled(draws=16), np.tile(np.float32(log_probs), (200, 1)))
    assert set(ids.ravel().tolist()) <= {0, 3, 6, 9}
    ends = np.full((1, V), -np.inf, np.float32)
    ends[0, 0] = 0.0
    assert set(kept(Sampled(draws=16), ends)[0].ravel().tolist()) == {0}


def test_errors_are_those_of_the_definition():
    full = np.asarray(TEACHER)[None]
    ids, log_probs = kept(TopK(k=4), full)
    found = jax.device_get(errors(jnp.asarray(ids), jnp.asarray(log_probs), jnp.asarray(full)))
    p = np.exp(np.float64(full[0]))
    lost = 1 - p[ids[0]].sum()
    assert found["kl"] == pytest.approx(-np.log(1 - lost), abs=5e-3)
    assert calibration_error(found["moved"], 1) == pytest.approx(lost, abs=0.05)
    ids, log_probs = kept(Tail(k=4), full)
    found = jax.device_get(errors(jnp.asarray(ids), jnp.asarray(log_probs), jnp.asarray(full)))
    assert found["kl"] < 1e-4
    assert calibration_error(found["moved"], 1) < 5e-3


@pytest.mark.parametrize("tied", [True, False])
def test_logits_need_the_output_table_alone(tied):
    model = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=V, context=16, tied=tied)
    table = "embed/table" if tied else "unembed/table"
    assert read_by_unembed(model.build(Compute())) == {table}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillOffline(match=0.0), "match: 0.0 is not above 0"),
        (lambda: DistillOffline(cross_entropy=-1.0), "cross_entropy: -1.0 is negative"),
        (lambda: TeacherTargets(folders=()), "folders is empty"),
        (lambda: TopK(k=V + 1).columns(V, 1), "--k is 13; expected 1 to 12"),
        (lambda: Sampled(draws=0).columns(V, 1), "--draws is 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
