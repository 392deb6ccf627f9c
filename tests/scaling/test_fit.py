"""Fits against surfaces without noise, and against the optima that others have published."""

import math

import numpy as np
import pytest
from published_runs import PUBLISHED, SURFACE, best, chinchilla, isoflop
from scipy.optimize import minimize

from slmjax.errors import UserError
from slmjax.scaling import law as laws
from slmjax.scaling.criterion import ABSOLUTE, HUBER, SQUARED, Criterion
from slmjax.scaling.fit import fit
from slmjax.scaling.law import Additive, Factor, Term, power, tied
from slmjax.scaling.law import chinchilla as chinchilla_law
from slmjax.scaling.quantity import PARAMETERS, TOKENS, Effective, Excess, Repeated
from slmjax.scaling.runs import read

pytestmark = pytest.mark.fast

STEEP = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.465, "beta": 0.155}


@pytest.mark.parametrize("criterion", [HUBER, SQUARED, ABSOLUTE, Criterion(math.inf, log=False)], ids=str)
@pytest.mark.parametrize("values", [SURFACE, STEEP], ids=["chinchilla", "steep"])
def test_a_surface_without_noise_is_found_exactly(values, criterion):
    fitted = fit(chinchilla_law(), isoflop(values).columns, criterion)
    for name, value in values.items():
        assert fitted.values[name] == pytest.approx(value, rel=1e-6), name
    flops = np.array([1e19, 1e24])
    n, d = best(values, flops)
    assert fitted.allocation.params(flops) == pytest.approx(n, rel=1e-5)
    assert fitted.allocation.tokens(flops) == pytest.approx(d, rel=1e-5)


def test_the_points_of_chinchilla_reach_the_published_optimum():
    """Besiroglu et al. 2024: 4500 starting points and L-BFGS."""
    runs = chinchilla()
    assert len(runs) == 240
    projected, from_grid = (fit(chinchilla_law(), runs.columns, method=m) for m in ("projection", "grid"))
    for fitted in (projected, from_grid):
        assert fitted.objective <= 0.0010182740 * (1 + 1e-6)
        published = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
        assert fitted.values == pytest.approx(published, rel=1e-5)
    assert projected.objective == pytest.approx(from_grid.objective, rel=1e-9)


@pytest.mark.parametrize("runs", [chinchilla(), isoflop(noise=0.01)], ids=["chinchilla", "noise of 1%"])
def test_least_squares_are_those_of_scipy_over_the_exponents(runs):
    """Variable projection by other means: lstsq for E, A, B inside scipy's search for (alpha, beta)."""
    n, d, loss = runs["params"] / 1e6, runs["tokens"] / 1e9, runs["loss"]

    def squares(exponents):
        matrix = np.stack([np.ones_like(n), n ** -exponents[0], d ** -exponents[1]], -1)
        return np.linalg.lstsq(matrix, loss, rcond=None)[1][0]

    found = minimize(squares, (0.4, 0.4), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15})
    fitted = fit(chinchilla_law(), runs.columns, Criterion(math.inf, log=False))
    assert 2 * fitted.objective == pytest.approx(found.fun, rel=1e-9)
    assert [fitted.values["alpha"], fitted.values["beta"]] == pytest.approx(found.x, rel=1e-6)


def test_the_headline_of_the_replication_is_the_fit_of_absolute_deviations():
    fitted = fit(chinchilla_law(), chinchilla().columns, ABSOLUTE)
    published = {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3659}
    assert fitted.values == pytest.approx(published, rel=2e-4)
    # At an optimum of the sum of |r|, as many residuals vanish as there are parameters.
    assert np.sum(np.abs(fitted.residuals) < 1e-7) == 5


@pytest.mark.parametrize(
    ("runs", "delta", "objective"),
    [
        ("hot", 1e-3, 0.0019816129),
        ("slim_chinchilla", 1e-3, 0.0001204363),
        ("hot", 1e-4, 0.0002076018),
        ("slim_chinchilla", 1e-4, 1.33978e-05),
    ],
)
def test_gemstones_are_fitted_at_least_as_well_as_published(runs, delta, objective):
    """McLeish et al. 2025, from 4500 starting points; those of delta 1e-4 had not converged."""
    fitted = fit(chinchilla_law(), read(PUBLISHED / f"gemstones_{runs}.csv").columns, Criterion(delta))
    assert fitted.objective <= objective * (1 + 1e-6)
    if delta == 1e-4:
        assert fitted.objective < objective * 0.9996
    elif runs == "hot":
        assert [fitted.values["alpha"], fitted.values["beta"]] == pytest.approx([0.2929, 0.7129], abs=2e-4)


def test_five_runs_predict_the_two_large_ones_of_gadre():
    """Gadre et al. 2024: relative errors of 0.7103% (1.4B, 640 tokens a parameter) and 0.7320% (6.9B, 20)."""
    runs = read(PUBLISHED / "gadre_redpajama.csv")
    per_token = np.round(runs["tokens"] / runs["params"])
    small = (per_token == 20) & (runs["params"] < 1e9) | (per_token == 320) & (runs["params"] < 5e7)
    assert small.sum() == 5
    fitted = fit(tied(), runs.take(small).columns, Criterion(math.inf, log=False))
    large = runs.take((runs["params"] > 1e9) & ((per_token == 640) | (runs["params"] > 5e9)))
    errors = np.abs(fitted.predict(large.columns) / large["loss"] - 1)
    assert sorted(errors) == pytest.approx([0.007103, 0.007320], abs=1e-6)


def composed():
    repeated = Repeated(unique="unique_tokens")
    return Additive(
        (
            power(Effective(kinds=("bits", "bits_activations")), "A", "alpha"),
            power(repeated, "B", "beta"),
            Term("C", (Factor(TOKENS, "gamma_d", grows=True), Factor(PARAMETERS, "alpha"))),
            power(Excess(scale=0.05, exponent=1.0), "F", "phi"),
        )
    )


def test_derivatives_are_those_of_finite_differences():
    law, runs = composed(), isoflop(points=4)
    rng = np.random.default_rng(0)
    n = len(runs)
    columns = dict(runs.columns)
    columns |= {name: rng.choice([2.0, 4.0, 16.0], n) for name in ("bits", "bits_activations")}
    columns |= {"unique_tokens": runs["tokens"] / rng.choice([1.0, 1.5, 30.0], n)}
    theta = rng.uniform(0.2, 1.2, (3, len(law.parameters)))
    theta[:, 1:5] += 4.0
    _, jacobian = law.log_loss(theta, columns)
    for i, parameter in enumerate(law.parameters):
        ends = []
        for step in (1e-5, -1e-5):
            moved = theta.copy()
            moved[:, i] += step
            ends.append(law.log_loss(moved, columns)[0])
        assert jacobian[..., i] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-8), parameter.name


def test_what_cannot_be_fitted_is_refused():
    runs = isoflop(points=1, budgets=10.0 ** np.arange(17, 21))
    with pytest.raises(UserError, match=r"4 runs cannot fit 5 parameters \(E, A, B, alpha, beta\)"):
        fit(chinchilla_law(), runs.columns)
    with pytest.raises(UserError, match="bits, which the table of runs does not have"):
        fit(chinchilla_law(Effective()), isoflop().columns)
    with pytest.raises(UserError, match="each needs a name of its own"):
        Additive((power(PARAMETERS, "A", "alpha"), power(TOKENS, "A", "beta")))
    with pytest.raises(UserError, match="no best split"):
        laws.allocation({}, Additive((power(PARAMETERS, "A", "alpha"),)))
    with pytest.raises(UserError, match="delta: -1"):
        Criterion(delta=-1.0)
