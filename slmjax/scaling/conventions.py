"""The exponent of the best size depends on what counts as a FLOP (Porian et al. 2024, arXiv:2406.19146)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slmjax.scaling.coupled import Coupled
from slmjax.scaling.criterion import HUBER, Criterion
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.fit import fit
from slmjax.scaling.law import Additive, chinchilla
from slmjax.scaling.runs import Runs
from slmjax.scaling.uncertainty import LEVEL, bootstrap

CONVENTIONS = {
    "nonembedding": "(i) 6 N without tables",
    "head": "(ii) (i) and the head",
    "attention": "(iii) (ii) and attention",
    "total": "(iv) 6 N",
}
"""As `models.flops.Flops` names them, and as `slmjax inspect` prints them"""


def flops_per_token(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Training FLOPs a token [n] under each convention that the columns [n] suffice for.

    (i) 6 N_nonembedding; (ii) 6 (N_nonembedding + V d): the product with the unembedding is counted, the lookup is not;
    (iii) (ii) + 6 T d L, causal attention over sequences of length T; (iv) 6 N.

    Args:
        columns: params_nonembedding; for (ii) also vocab (V) and width (d); for (iii) layers (L) and length (T); for
            (iv) params.
    """
    out: dict[str, np.ndarray] = {}
    if "params_nonembedding" in columns:
        out["nonembedding"] = 6.0 * columns["params_nonembedding"]
        if {"vocab", "width"} <= columns.keys():
            out["head"] = out["nonembedding"] + 6.0 * columns["vocab"] * columns["width"]
            if {"layers", "length"} <= columns.keys():
                out["attention"] = out["head"] + 6.0 * columns["length"] * columns["width"] * columns["layers"]
    if "params" in columns:
        out["total"] = 6.0 * columns["params"]
    return out


def exponents(
    runs: Runs,
    criterion: Criterion = HUBER,
    *,
    law: Additive | Coupled | None = None,
    draws: int = 300,
    level: float = LEVEL,
) -> dict[str, Estimated]:
    """a of N* ~ C^a under each convention: N is a sixth of the FLOPs a token, so that C = 6 N D holds in each, and
    the law is fitted again with it."""
    law = chinchilla() if law is None else law
    out = {}
    for name, flops in flops_per_token(runs.columns).items():
        columns = {**runs.columns, "params": flops / 6, "flops": flops * runs["tokens"]}
        fitted = fit(law, columns, criterion)
        refits = bootstrap(fitted, draws, level=level, cells=runs.cells)
        out[name] = from_draws(float(fitted.allocation.a[0]), refits.allocation.a, level)
    return out
