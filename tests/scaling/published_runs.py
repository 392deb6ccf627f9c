"""Published runs (published/README.md says whose), and surfaces without noise."""

from pathlib import Path

import numpy as np

from slmjax.scaling.runs import drop_highest, read, table

PUBLISHED = Path(__file__).parent / "published"
SURFACE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Of Hoffmann et al. 2022"""


def chinchilla():
    """The 240 runs that Besiroglu et al. 2024 fit."""
    return drop_highest(read(PUBLISHED / "chinchilla.csv"), 5)


def surface(values, params, tokens):
    """The loss in closed form."""
    return values["E"] + values["A"] / params ** values["alpha"] + values["B"] / tokens ** values["beta"]


def isoflop(values=SURFACE, *, budgets=(1e17, 1e18, 1e19, 1e20, 1e21), width=8.0, points=15, noise=0.0, seed=0):
    """Budgets with sizes around the best one, from best / width to best * width."""
    n, d = best(values, budgets)
    tokens = np.outer(d, width ** np.linspace(-1, 1, points)).ravel()
    params = np.repeat(n * d, points) / tokens
    loss = surface(values, params, tokens) * np.exp(noise * np.random.default_rng(seed).normal(size=len(params)))
    return table({"params": params, "tokens": tokens, "loss": loss})


def best(values, flops):
    """(N*, D*) of a surface by search, and not by the closed form."""
    from scipy.optimize import minimize_scalar

    found = []
    for budget in np.atleast_1d(flops):
        low, high = 0.0, np.log(budget / 6)
        log_n = minimize_scalar(
            lambda x, budget=budget: surface(values, np.exp(x), budget / 6 / np.exp(x)),
            bounds=(low, high), method="bounded", options={"xatol": 1e-12},
        ).x  # fmt: skip
        found.append((np.exp(log_n), budget / 6 / np.exp(log_n)))
    return tuple(np.asarray(found).T)
