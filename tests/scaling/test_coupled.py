"""The coupled law against its definition and surfaces that it describes; the test for a law that does not fit."""

import numpy as np
import pytest
from published_runs import SURFACE, isoflop
from scipy import stats

from slmjax.scaling.analysis import Settings, analyse
from slmjax.scaling.coupled import Coupled
from slmjax.scaling.criterion import SQUARED
from slmjax.scaling.fit import fit
from slmjax.scaling.law import chinchilla
from slmjax.scaling.runs import Runs
from slmjax.scaling.uncertainty import lack_of_fit

pytestmark = pytest.mark.fast

LAW = Coupled(chinchilla())
VALUES = {"E": 0.3, "A": 8e4, "B": 5e4, "alpha": 1.0, "beta": 0.67, "gamma": 0.2}


def surface(values, params, tokens):
    v = values
    return v["E"] + (v["A"] / params ** v["alpha"] + v["B"] / tokens ** v["beta"]) ** v["gamma"]


def runs(noise=0.0, seeds=1, values=VALUES):
    """Five sizes at each of five budgets of small models."""
    rng, rows = np.random.default_rng(0), []
    for flops in np.geomspace(3e10, 3e12, 5):
        for n in 2e4 * (flops / 1e11) ** 0.4 * np.geomspace(0.25, 4, 5):
            rows += [(n, flops / 6 / n, flops, seed) for seed in range(seeds)]
    n, d, flops, seed = np.asarray(rows).T
    loss = surface(values, n, d) * np.exp(noise * rng.normal(size=len(n)))
    return Runs({"params": n, "tokens": d, "flops": flops, "seed": seed, "loss": loss}, source="made up")


def theta(values, law=LAW):
    return np.array([[np.log(values[p.name]) if p.log else values[p.name] for p in law.parameters]])


def test_value_and_derivatives_are_those_of_the_definition():
    columns, at = runs().columns, theta(VALUES)
    value, jacobian = LAW.log_loss(at, columns)
    assert value[0] == pytest.approx(np.log(surface(VALUES, columns["params"], columns["tokens"])), rel=1e-12)
    for i in range(at.shape[1]):
        step = np.zeros_like(at)
        step[0, i] = 1e-6
        moved = (LAW.log_loss(at + step, columns)[0] - LAW.log_loss(at - step, columns)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[0, :, i], moved[0], rtol=1e-6, atol=1e-9)


def test_with_the_power_one_it_is_the_sum():
    columns, at = isoflop(SURFACE).columns, theta(SURFACE | {"gamma": 1.0})
    for mine, sums in zip(LAW.log_loss(at, columns), LAW.inner.log_loss(at[:, :-1], columns), strict=True):
        np.testing.assert_allclose(mine[..., : sums.shape[-1]], sums, rtol=1e-12)


def test_a_surface_without_noise_is_found_exactly():
    for law_of in (VALUES, VALUES | {"gamma": 0.6, "A": 300.0, "B": 200.0, "alpha": 0.6, "beta": 0.5}):
        fitted = fit(LAW, runs(values=law_of).columns, SQUARED)
        for name, value in law_of.items():
            assert fitted.values[name] == pytest.approx(value, rel=1e-4), name


def test_the_best_split_is_that_of_the_sum():
    fitted = fit(LAW, runs().columns)
    params = np.geomspace(1e3, 1e7, 200_001)
    for flops in (1e11, 1e13):
        best = params[np.argmin(surface(VALUES, params, flops / 6 / params))]
        assert float(fitted.allocation.params(flops)[0]) == pytest.approx(best, rel=1e-3)


def test_a_sum_that_does_not_fit_is_said_and_the_coupled_law_fits():
    table = runs(noise=0.002, seeds=2)
    alone = analyse(table, Settings(draws=20))
    assert any("the law does not fit" in note and "try the coupled law" in note for note in alone.notes)
    both = analyse(table, Settings(draws=20, coupled=True))
    assert not any("does not fit" in note for note in both.notes)
    far = {"params": 2e5, "tokens": 1.4e7}
    truth = surface(VALUES, *far.values())
    errors = [abs(float(found.fitted.predict(far)[0]) / truth - 1) for found in (both, alone)]
    assert errors[0] < 0.01 < errors[1]


def test_the_chance_is_uniform_where_the_law_is_right():
    table = runs(seeds=3)
    at = theta(VALUES)[0]
    chances = []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=len(table)) * 0.01
        columns = table.columns | {"loss": table["loss"] * np.exp(noise)}
        fitted = fit(LAW, columns, SQUARED, start=at[None])
        found = lack_of_fit(Runs(columns, source="made up"), fitted)
        assert found is not None
        chances.append(found.chance)
    assert stats.kstest(chances, "uniform").pvalue > 0.01


def test_without_seeds_nothing_is_said():
    table = runs()
    assert lack_of_fit(table, fit(LAW, table.columns)) is None
