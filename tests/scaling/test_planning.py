"""Approaches 1 and 2, the best run within limits, held-out runs, conventions of FLOPs."""

import numpy as np
import pytest
from published_runs import SURFACE, best, chinchilla, isoflop, surface
from scipy.optimize import minimize_scalar

from slmjax.errors import UserError
from slmjax.scaling import approaches, conventions, planning
from slmjax.scaling.fit import fit
from slmjax.scaling.law import chinchilla as chinchilla_law
from slmjax.scaling.quantity import Effective, Repeated
from slmjax.scaling.runs import Runs, table
from slmjax.scaling.uncertainty import bootstrap

pytestmark = pytest.mark.fast

THREE_TIMES = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.465, "beta": 0.155}


@pytest.mark.parametrize(
    ("values", "errors"),
    [(SURFACE, (-0.003, -0.013, -0.029, -0.051)), (THREE_TIMES, (-0.017, -0.065, -0.139, -0.231))],
    ids=["chinchilla", "alpha is three times beta"],
)
def test_the_bias_of_parabolas_on_surfaces_without_noise(values, errors):
    """D* at 1e24 FLOPs, from 5 budgets of 15 sizes within factors of 2, 4, 8, 16 (Czech et al. 2026)."""
    for width, error in zip((2, 4, 8, 16), errors, strict=True):
        runs = isoflop(values, width=width)
        fitted = fit(chinchilla_law(), runs.columns)
        found = approaches.bias(runs, fitted.predict(runs.columns), fitted.allocation, 1e24)
        assert found.tokens == pytest.approx(error, abs=0.001)
        direct = approaches.isoflop(runs, draws=0)
        assert direct.tokens(1e24) / best(values, 1e24)[1][0] - 1 == pytest.approx(error, abs=0.001)
        assert found.a == pytest.approx(0, abs=1e-6)


def test_centres_that_drift_bias_the_exponent():
    """Grids around 1 to 4 times the best size, rising with the budget: the bias of a is of the law, and not of
    noise."""
    budgets = np.array([1e17, 1e18, 1e19, 1e20, 1e21])
    values = THREE_TIMES
    centred = np.concatenate([isoflop(values, budgets=(c,), width=8)["params"] for c in budgets])
    biases = []
    for far in (1, 4):
        params = centred * np.repeat(np.geomspace(1, far, 5), 15)
        tokens = np.repeat(budgets, 15) / 6 / params
        runs = table({"params": params, "tokens": tokens, "loss": surface(values, params, tokens)})
        fitted = fit(chinchilla_law(), runs.columns)
        assert fitted.values["alpha"] == pytest.approx(values["alpha"], rel=1e-6)
        biases.append(approaches.bias(runs, fitted.predict(runs.columns), fitted.allocation, 1e24).a)
    assert abs(biases[0]) < 1e-6
    assert abs(biases[1]) > 1e-3


def test_parabolas_at_the_edge_are_rejected_and_two_budgets_have_no_error():
    runs = isoflop(noise=0.002, points=7)
    small = Runs({k: v[np.r_[0:14, 14:17]] for k, v in runs.columns.items()})  # the third budget's minimum is cut off
    found = approaches.isoflop(small, draws=20)
    assert [bool(m.rejected) for m in found.minima] == [False, False, True]
    assert "add " in found.minima[2].rejected
    assert "a third budget" in found.a.reason
    whole = approaches.isoflop(runs, draws=100)
    assert whole.a.low < SURFACE["beta"] / (SURFACE["alpha"] + SURFACE["beta"]) < whole.a.high
    assert whole.a.value + whole.b.value == pytest.approx(1)
    for columns, message in (
        (chinchilla().columns, "FLOPs are spread"),
        (isoflop(budgets=(1e18,)).columns, "there is one budget"),
        ({**runs.columns, "bits": np.resize([2.0, 4.0], 35)}, "here bits differs too"),
    ):
        with pytest.raises(UserError, match=message):
            approaches.isoflop(Runs(columns))


def test_the_envelope_of_curves_follows_the_best_size():
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 25), np.geomspace(1e8, 1e12, 40)))
    runs = table({"params": n, "tokens": d, "loss": surface(SURFACE, n, d)})
    found = approaches.envelope(runs)
    assert found.a.value == pytest.approx(SURFACE["beta"] / (SURFACE["alpha"] + SURFACE["beta"]), abs=0.002)
    assert found.a.se < 0.002
    assert found.params(1e21) == pytest.approx(best(SURFACE, 1e21)[0][0], rel=0.1)
    with pytest.raises(UserError, match="it has 0"):
        approaches.envelope(isoflop(points=4))


def test_held_out_runs_of_chinchilla():
    """Fitted to the 177 runs below 3e20 FLOPs, the other 63 are predicted with errors of 0.91% (median) and 4.1%."""
    runs = chinchilla()
    draws = bootstrap(fit(chinchilla_law(), runs.columns), 2)
    found = planning.held_out(draws, runs, 3e20, count=60)
    assert (found.fitted_runs, len(found.actual)) == (177, 63)
    report = found.json()
    assert report["median_error"] == pytest.approx(0.0091, abs=1e-4)
    assert report["largest_error"] == pytest.approx(0.041, abs=5e-4)
    assert report["error_of_most_expensive"] == report["largest_error"]
    assert report["median_error_of_a_line_without_floor"] > 3 * report["median_error"]
    assert 0 < report["inside_interval"] < 1
    with pytest.raises(UserError, match="leave 240 runs to fit and 0 to predict"):
        planning.held_out(draws, runs, 1e30)


def test_rolling_out_budgets():
    runs = isoflop(noise=0.002, points=7)
    draws = bootstrap(fit(chinchilla_law(), runs.columns), 2)
    found = planning.roll_out(draws, runs, count=40)
    assert [(h.fitted_runs, len(h.actual)) for h in found] == [(28, 7), (21, 14)]
    assert max(np.abs(h.errors).max() for h in found) < 0.02
    with pytest.raises(UserError, match="2 budgets; leaving out 2 needs 4"):
        planning.roll_out(draws, isoflop(budgets=(1e18, 1e19)))


def test_the_best_run_without_limits_is_the_closed_form():
    runs = isoflop(noise=0.002, points=7)
    draws = bootstrap(fit(chinchilla_law(), runs.columns), 40)
    found = planning.best(draws, planning.Limits(1e22))
    assert found.params.value == pytest.approx(draws.fitted.allocation.params(1e22)[0], rel=0.006)
    assert found.params.low < found.params.value < found.params.high
    assert found.params.value * found.tokens.value * 6 == pytest.approx(1e22)
    with pytest.raises(UserError, match="knows nothing of bits"):
        planning.best(draws, planning.Limits(1e22, bits=(2.0, 4.0)))
    with pytest.raises(UserError, match="flops: -1"):
        planning.Limits(-1.0)


def test_the_best_run_in_bytes_and_of_little_data():
    n, d, bits = (
        x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e8, 1e11, 5), [2.0, 4.0, 8.0])
    )
    unique = d / np.resize([1.0, 4.0, 30.0], len(d))

    def loss(n, d, bits, unique):
        worth = unique * (1 + 15 * (1 - np.exp(-(d / unique - 1) / 15)))
        return surface(SURFACE, n * (1 - np.exp(-bits / 2.5)), worth)

    columns = {"params": n, "tokens": d, "bits": bits, "unique_tokens": unique, "loss": loss(n, d, bits, unique)}
    fitted = fit(chinchilla_law(Effective(), Repeated()), table(columns).columns)
    assert fitted.values == pytest.approx(SURFACE | {"gamma_bits": 2.5, "R": 15.0}, rel=1e-5)
    limits = planning.Limits(1e19, size_bytes=40e6, bits=(2.0, 4.0, 8.0), unique_tokens=3e9)
    found = planning.best(bootstrap(fitted, 5), limits)
    direct = []
    for b in limits.bits:
        most = np.log(min(40e6 * 8 / b, 1e19 / 6))
        at = minimize_scalar(
            lambda x, b=b: loss(np.exp(x), 1e19 / 6 / np.exp(x), b, min(3e9, 1e19 / 6 / np.exp(x))),
            bounds=(np.log(1e5), most), method="bounded",
        )  # fmt: skip
        direct.append((float(at.fun), b, float(np.exp(at.x))))
    lowest, chosen, params = min(direct)
    assert found.bits == chosen
    assert found.params.value == pytest.approx(params, rel=0.01)
    assert found.loss.mean.value == pytest.approx(lowest, rel=1e-4)
    assert found.choices[chosen] == 1


def test_what_counts_as_flops_moves_the_exponent():
    columns = {
        "params_nonembedding": np.array([1e6, 1e8]), "vocab": np.full(2, 32e3), "width": np.array([128.0, 1024.0]),
        "layers": np.array([4.0, 12.0]), "length": np.array([1024.0, 1024.0]), "params": np.array([9e6, 1.6e8]),
    }  # fmt: skip
    found = conventions.flops_per_token(columns)
    assert found.keys() == conventions.CONVENTIONS.keys()
    assert found["head"][0] == 6 * (1e6 + 32e3 * 128)
    assert found["attention"][1] == found["head"][1] + 6 * 1024 * 1024 * 12
    assert conventions.flops_per_token({"params": columns["params"]}).keys() == {"total"}
    # A law in all parameters: without the tables, small models look smaller, and the best size grows faster.
    total = np.geomspace(1e6, 1e9, 8)
    n, d = (x.ravel() for x in np.meshgrid(total, np.geomspace(1e8, 1e11, 8)))
    columns = {"params": n, "params_nonembedding": n - 300 * n**0.5, "tokens": d, "loss": surface(SURFACE, n, d)}
    runs = table(columns)
    exponents = conventions.exponents(runs, draws=10)
    assert exponents["total"].value == pytest.approx(0.28 / 0.62, rel=1e-6)
    assert exponents["nonembedding"].value > exponents["total"].value + 0.01
