"""Post-training quantization of a model: by rounding, or with calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slmjax import tree
from slmjax.compress.ptq.gptq import gptq
from slmjax.compress.ptq.rtn import Search, least_error, usual
from slmjax.compress.quant.in_memory import width
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import Packed, Rule, chosen, with_values
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.runs.calibrating import Grams, grams
from slmjax.runs.packed_folder import steps_of
from slmjax.runs.quantizing_awq import AWQ
from slmjax.runs.quantizing_parts import (
    Method,
    Parts,
    Progress,
    Rounded,
    axes_of,
    jobs_of,
    silent,
    tables_of,
    to_nearest,
)
from slmjax.types import Batch, Params

__all__ = ["AWQ", "GPTQ", "METHODS", "RTN", "Method", "Progress", "Rounded", "bits_a_weight", "silent"]


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Round to nearest, each weight by itself."""

    search: Search = usual

    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> Rounded:
        axes, weights, packed = axes_of(model), tree.flatten(params), {}
        quantizers = chosen(model.axes(), rules)
        for done, (path, quantizer) in enumerate(quantizers.items(), start=1):
            packed[path] = to_nearest(path, quantizer, weights[path], axes[path], self.search)
            progress("parameters", done, len(quantizers))
        return Rounded(with_values(params, packed), packed)


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """GPTQ: each matrix of the layers by the Gram matrix of its inputs on calibration data; tables to nearest.
    Frantar et al. 2023, arXiv:2210.17323.

    The inputs of a layer are those of the model whose earlier layers are rounded already. The original runs the model
    once a layer for that; here the layers are split into `rounds` parts of consecutive layers, whose inputs are
    measured together.
    """

    rounds: int = 4
    search: Search = least_error
    reads_data: ClassVar[bool] = True

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"--rounds is {self.rounds}; expected at least 1")

    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> Rounded:
        quantizers, axes = chosen(model.axes(), rules), axes_of(model)
        weights = {path: np.array(x, np.float32) for path, x in tree.flatten(params).items()}
        jobs = jobs_of(model, quantizers)
        inside = dict.fromkeys(path for job in jobs for path, _ in job)
        tables = tables_of(quantizers, inside, weights, axes, self.search)
        parts = {path: Parts.of(path, quantizers[path], weights[path].shape, axes[path]) for path in inside}
        done, rounds = 0, [list(x) for x in np.array_split(np.arange(model.layers), min(self.rounds, model.layers))]
        for of_round in rounds:
            found = grams(model, tree.unflatten(weights), batches)
            for path, index in (job for number in of_round for job in jobs[number]):
                self._one(path, index, quantizers[path], weights, parts[path], found)
                done += 1
                progress("matrices", done, sum(map(len, jobs)))
        packed = tables | {path: part.packed(quantizers[path], axes[path]) for path, part in parts.items()}
        return Rounded(with_values(params, packed), packed)

    def _one(
        self, path: str, index: int, quantizer: Quantizer, weights: dict[str, np.ndarray], part: Parts, found: Grams
    ) -> None:
        matrix = part.matrix(weights[path][index])
        codes, steps, zeros = gptq(quantizer, matrix, found.of(path)[index], part.group, self.search)
        part.put(index, codes, steps, zeros)
        scale = np.repeat(steps, matrix.shape[1] // steps.shape[1], axis=1)
        shift = 0 if zeros is None else np.repeat(zeros, matrix.shape[1] // steps.shape[1], axis=1)
        weights[path][index] = part.back(scale * (codes - shift + np.float32(quantizer.grid.offset)))


def bits_a_weight(packed: Mapping[str, Packed]) -> float:
    """Mean bits of the quantized weights in slmjax's own folder: their codes, steps and zero points."""
    total = sum(
        8 * sum(x.nbytes for x in steps_of(p).values())
        + np.prod(p.blocks.shape) * width(p.grid.levels)
        + (0 if p.codes.zeros is None else 8 * np.size(p.codes.zeros))
        for p in packed.values()
    )
    return float(total / sum(np.prod(p.blocks.shape) for p in packed.values()))


METHODS: Mapping[str, Method] = {
    "rtn": RTN(),
    "rtn-mse": RTN(search=least_error),
    "gptq": GPTQ(),
    "awq": AWQ(),
}
"""What `slmjax quantize --method` takes"""
