"""Pruning of one matrix, against the definitions written out as loops in float64."""

import numpy as np
import pytest

from slmjax.compress.prune.layout import from_matrices, to_matrices
from slmjax.compress.prune.oneshot import magnitude, output_error, sparsegpt, wanda
from slmjax.errors import UserError

pytestmark = pytest.mark.fast


def matrix(rows, inputs, seed=0, tokens=400, correlated=0.9):
    """w [rows, inputs], and inputs X [tokens, inputs] of very different sizes that depend on few hidden causes."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(tokens, max(inputs // 4, 1))) @ rng.normal(size=(max(inputs // 4, 1), inputs))
    x = correlated * causes / np.sqrt(inputs // 4) + (1 - correlated) * rng.normal(size=(tokens, inputs))
    x = x * np.exp(rng.normal(size=inputs))
    return rng.normal(size=(rows, inputs)), x


def lowest(scores, count):
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return {int(i) for i in order[:count]}


def textbook(w, gram, sparsity, m, block, damping=0.01):
    """Optimal brain surgeon, column by column, with the inverse of what is left of H computed anew for each column.

    Hassibi et al. 1993: pruning w_q costs w_q^2 / [H^-1]_qq, and -w_q / [H^-1]_qq * [H^-1]_:q makes up for it.
    """
    w, h = w.astype(np.float64).copy(), gram.astype(np.float64).copy()
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    rows, inputs = w.shape
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(inputs)]
    pruned = np.zeros(w.shape, bool)
    for j in range(inputs):
        if m is None and j % block == 0:
            last = min(j + block, inputs)
            cells = [(r, c) for c in range(j, last) for r in range(rows)]
            costs = [w[r, c] ** 2 / inverses[c][0, 0] for r, c in cells]
            count = round(sparsity * rows * last) - round(sparsity * rows * j)
            for i in lowest(costs, count):
                pruned[cells[i]] = True
        elif m is not None and j % m == 0:
            for r in range(rows):
                costs = [w[r, c] ** 2 / inverses[c][0, 0] for c in range(j, j + m)]
                for i in lowest(costs, round(sparsity * m)):
                    pruned[r, j + i] = True
        for r in range(rows):
            if pruned[r, j]:
                w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][:, 0]
                w[r, j] = 0.0
    return w, ~pruned


@pytest.mark.parametrize(("sparsity", "m"), [(0.5, None), (0.3, None), (0.5, 4), (0.25, 4), (0.5, 8)])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_is_optimal_brain_surgeon(sparsity, m, block):
    w, x = matrix(5, 24)
    gram = x.T @ x
    expected, kept = textbook(w, gram, sparsity, m, block)
    pruned = sparsegpt(w, gram, sparsity, m=m, block=block)
    np.testing.assert_array_equal(pruned.keep, kept)
    np.testing.assert_allclose(pruned.weights, expected, atol=1e-9 * np.abs(expected).max())
    assert np.all((pruned.weights == 0) == ~kept)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_wanda_and_magnitude_as_defined(sparsity):
    w, x = matrix(7, 20)
    norms = [np.sqrt(sum(v**2 for v in x[:, j])) for j in range(20)]
    expected = np.ones(w.shape, bool)
    for r in range(7):
        for j in lowest([abs(w[r, j]) * norms[j] for j in range(20)], round(sparsity * 20)):
            expected[r, j] = False
    pruned = wanda(w, x.T @ x, sparsity)
    np.testing.assert_array_equal(pruned.keep, expected)
    np.testing.assert_array_equal(pruned.weights, w * expected)
    pruned = magnitude(w, sparsity)
    assert set(np.flatnonzero(~pruned.keep)) == lowest(np.abs(w).ravel(), round(sparsity * w.size))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_is_exact(n, m):
    w, x = matrix(9, 48)
    for pruned in (
        magnitude(w, 1 - n / m, m=m),
        wanda(w, x.T @ x, 1 - n / m, m=m),
        sparsegpt(w, x.T @ x, 1 - n / m, m=m, block=16),
    ):
        assert np.all((pruned.weights.reshape(-1, m) != 0).sum(1) == n)
        np.testing.assert_array_equal(pruned.weights != 0, pruned.keep)
    kept = wanda(w, x.T @ x, 1 - n / m, m=m).keep.reshape(-1, m)
    scores = (np.abs(w) * np.linalg.norm(x, axis=0)).reshape(-1, m)
    assert all(s[k].min() > s[~k].max() for s, k in zip(scores, kept, strict=True))


@pytest.mark.parametrize("m", [None, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_outputs_change_least_with_sparsegpt_then_wanda_then_magnitude(seed, m):
    w, x = matrix(48, 64, seed, tokens=1000)
    gram = x.T @ x
    pruned = [sparsegpt(w, gram, 0.5, m=m, block=32), wanda(w, gram, 0.5, m=m), magnitude(w, 0.5, m=m)]
    errors = [np.sum(np.square(x @ w.T - x @ p.weights.T)) for p in pruned]  # of the outputs themselves
    assert errors[0] < errors[1] < errors[2]
    for p, error in zip(pruned, errors, strict=True):
        assert output_error(w, p.weights, gram) == pytest.approx(error, rel=1e-9)
        assert (~p.keep).sum() == w.size // 2


def test_what_sparsegpt_leaves_is_near_the_least_squares_solution():
    """No other weights at the places that it kept change the outputs less than the least-squares solution does."""
    w, x = matrix(16, 32)
    pruned = sparsegpt(w, x.T @ x, 0.5, damping=1e-6)
    best = 0.0
    for row, kept in zip(w, pruned.keep, strict=True):
        solution = np.linalg.lstsq(x[:, kept], x @ row, rcond=None)[0]
        best += np.sum(np.square(x @ row - x[:, kept] @ solution))
    plain = output_error(w, w * pruned.keep, x.T @ x)
    assert best <= output_error(w, pruned.weights, x.T @ x) < 0.5 * plain


def test_odd_numbers_are_exact():
    w, x = matrix(7, 30)
    for sparsity in (0.1, 0.33, 0.71):
        for pruned in (sparsegpt(w, x.T @ x, sparsity, block=7), magnitude(w, sparsity)):
            assert (~pruned.keep).sum() == round(sparsity * w.size)


def test_inputs_that_are_always_zero_lose_their_weights():
    w, x = matrix(6, 16)
    x[:, [3, 9]] = 0.0
    pruned = sparsegpt(w, x.T @ x, 0.25)
    assert not np.any(pruned.weights[:, [3, 9]])
    assert np.isfinite(pruned.weights).all()
    live = [j for j in range(16) if j not in (3, 9)]
    alone = textbook(w[:, live], (x.T @ x)[np.ix_(live, live)], 2 / 14, None, 128)[0]  # 24 of 96, 12 of which were free
    np.testing.assert_allclose(pruned.weights[:, live], alone, atol=1e-9)
    assert not np.any(sparsegpt(w, np.zeros((16, 16)), 0.5).weights)


def test_a_factor_on_the_gram_matrix_changes_nothing():
    w, x = matrix(6, 16)
    for method in (wanda, sparsegpt):
        np.testing.assert_allclose(
            method(w, x.T @ x, 0.5).weights, method(w, 2 / 400 * (x.T @ x), 0.5).weights, atol=1e-12
        )


def test_float32_in_float32_out():
    w, x = matrix(6, 16)
    gram = (x.T @ x).astype(np.float32)
    for pruned in (sparsegpt(w.astype(np.float32), gram, 0.5), wanda(w.astype(np.float32), gram, 0.5)):
        assert pruned.weights.dtype == np.float32
        assert pruned.keep.dtype == bool


def test_our_output_projection_is_pruned_along_its_inputs():
    """o [layers, heads, head_dim, D]: the error that the Gram matrix gives is that of the attention's output."""
    rng = np.random.default_rng(0)
    axes = ("layers", "heads", "head_dim", "embed")
    o, x = rng.normal(size=(1, 4, 8, 24)), matrix(1, 32)[1]
    (w,) = to_matrices(o, axes, "o")
    pruned = sparsegpt(w, x.T @ x, 0.5, m=4)
    new = from_matrices(pruned.weights[None], o.shape, axes, "o")
    heads = x.reshape(-1, 4, 8)
    change = np.einsum("nhk,hkd->nd", heads, o[0]) - np.einsum("nhk,hkd->nd", heads, new[0])
    assert output_error(w, pruned.weights, x.T @ x) == pytest.approx(np.sum(np.square(change)), rel=1e-9)
    assert np.all((new[0].reshape(8, 4, 24) != 0).sum(1) == 2)


W, X = matrix(4, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wanda(W, X.T @ X, 1.0), "sparsity is 1.0"),
        (lambda: magnitude(W, 0.3, m=4), "not a whole number of every 4"),
        (lambda: magnitude(W, 1 / 3, m=3), "does not divide the 16 input channels"),
        (lambda: wanda(W, X.T @ X[:, :8], 0.5), r"shape \(16, 8\); expected \(16, 16\)"),
        (lambda: sparsegpt(W, X.T @ X * np.inf, 0.5), "not finite"),
        (lambda: sparsegpt(W, X.T @ X, 0.5, m=4, block=6), "block is 6; expected a multiple of m = 4"),
        (lambda: sparsegpt(W, -X.T @ X, 0.5), "damping is 0.01, too little"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
