"""AWQ of a model: which channels are scaled, and the rounding after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from slmjax import tree
from slmjax.compress.ptq import awq
from slmjax.compress.ptq.rtn import usual
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import Rule, chosen, with_values
from slmjax.models.assembly import Assembly
from slmjax.models.rescaling import exchanges
from slmjax.runs.calibrating import Grams, grams
from slmjax.runs.quantizing_parts import Method, Parts, Progress, Rounded, axes_of, jobs_of, tables_of
from slmjax.types import Batch, Params


class Scaled(NamedTuple):
    """A model whose channels have been multiplied and divided by factors that cancel out."""

    params: Params
    factors: dict[str, np.ndarray]
    """By which the input channels of each matrix were multiplied, float32 [layers, in]"""


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """AWQ: matrices that read the same channels are multiplied by powers of the channels' mean size on calibration
    data, and what produces the channels is divided by them (`models.rescaling`); then large weights are clipped.
    Lin et al. 2023, arXiv:2306.00978.

    Powers and clipping are those with the least error of the outputs of the matrices themselves, where the original
    takes that of the attention or the feed-forward layer for the powers. The inputs are those of the full-precision
    model. Matrices whose channels nothing can divide are clipped only; tables are rounded to nearest.
    """

    reads_data: ClassVar[bool] = True

    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> Rounded:
        quantizers, axes = chosen(model.axes(), rules), axes_of(model)
        inside = [path for job in jobs_of(model, quantizers) for path, _ in job]
        flat = tree.flatten(params)
        parts = {path: Parts.of(path, quantizers[path], flat[path].shape, axes[path]) for path in inside}
        found, done = grams(model, params, batches), 0
        scaled = self.scaled(model, params, quantizers, found)
        weights = {path: np.asarray(x, np.float32) for path, x in tree.flatten(scaled.params).items()}
        for path, part in parts.items():
            for index, gram in enumerate(found.of(path)):
                s = scaled.factors[path][index]
                matrix = awq.Matrix(quantizers[path], part.matrix(weights[path][index]), part.group)
                part.put(index, *awq.clipped(matrix, gram / np.outer(s, s)))
                done += 1
                progress("matrices", done, len(inside))
        packed = tables_of(quantizers, parts, weights, axes, usual)
        packed |= {path: part.packed(quantizers[path], axes[path]) for path, part in parts.items()}
        return Rounded(with_values(scaled.params, packed), packed)

    def scaled(self, model: Assembly, params: Params, quantizers: Mapping[str, Quantizer], found: Grams) -> Scaled:
        """The model with the factors that lose least when it is rounded. It computes what it did before.

        All factors are searched for on the weights as they were: those of an output channel change no other channel's
        error, but would weigh it.
        """
        old = {path: np.asarray(x, np.float32) for path, x in tree.flatten(params).items()}
        new, axes = {path: x.copy() for path, x in old.items()}, axes_of(model)
        factors = {path: np.ones(found.sizes(path).shape, np.float32) for path in found.sums}
        for place, exchange in ((p, exchange) for p in model.places() for exchange in exchanges(p.block)):
            within = f"{place.path}/"
            paths = [within + name for name in exchange.readers]
            rounded = [path for path in paths if path in quantizers]
            if not rounded:
                continue
            parts = [Parts.of(path, quantizers[path], old[path].shape, axes[path]) for path in rounded]
            for i in range(len(place.numbers)):
                matrices = [
                    awq.Matrix(quantizers[path], part.matrix(old[path][i]), part.group)
                    for path, part in zip(rounded, parts, strict=True)
                ]
                gram, sizes = found.of(paths[0])[i], exchange.gathered(found.sizes(paths[0])[i])
                s = awq.best_factors(matrices, gram, sizes, exchange.spread)
                layer = {path.removeprefix(within): x[i] for path, x in new.items() if path.startswith(within)}
                for name, x in exchange.apply(layer, s).items():
                    new[within + name][i] = x
                for path in paths:
                    factors[path][i] = exchange.spread(s)
        return Scaled(tree.unflatten(new), factors)
