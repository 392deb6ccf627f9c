"""Post-training quantization of a model: by rounding, or with calibration data."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from slmjax import tree
from slmjax.compress.ptq.gptq import gptq
from slmjax.compress.ptq.rtn import Search, least_error, nearest, usual
from slmjax.compress.quant.blocks import Axes, Blocks, PerTensor, sides
from slmjax.compress.quant.grids import Codes
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import Packed, Rule, chosen
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.runs.calibrating import Grams, grams
from slmjax.runs.packed_folder import width
from slmjax.types import Batch, Params

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


def silent(what: str, done: int, of: int) -> None:
    """No progress."""


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How weights are rounded after training."""

    reads_data: ClassVar[bool] = False
    """Whether it needs calibration data"""

    @abc.abstractmethod
    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> dict[str, Packed]:
        """{path: codes} of the parameters that `rules` name.

        Args:
            batches: calibration data; a method that needs none ignores them.
        """


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Round to nearest, each weight by itself."""

    search: Search = usual

    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> dict[str, Packed]:
        axes, weights, packed = _axes(model), tree.flatten(params), {}
        quantizers = chosen(model.axes(), rules)
        for done, (path, quantizer) in enumerate(quantizers.items(), start=1):
            packed[path] = _nearest(path, quantizer, weights[path], axes[path], self.search)
            progress("parameters", done, len(quantizers))
        return packed


def _nearest(path: str, quantizer: Quantizer, w: Any, axes: Axes, search: Search) -> Packed:
    blocks = quantizer.granularity.cut(tuple(w.shape), axes, path)
    return Packed(nearest(quantizer, jnp.asarray(w), blocks, search), quantizer.grid, blocks, axes)


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
    ) -> dict[str, Packed]:
        quantizers, axes = chosen(model.axes(), rules), _axes(model)
        weights = {path: np.array(x, np.float32) for path, x in tree.flatten(params).items()}
        jobs = _jobs(model, quantizers)
        inside = dict.fromkeys(path for job in jobs for path, _ in job)
        tables = {
            path: _nearest(path, quantizer, weights[path], axes[path], self.search)
            for path, quantizer in quantizers.items()
            if path not in inside
        }
        parts = {path: _Parts.of(path, quantizers[path], weights[path].shape, axes[path]) for path in inside}
        done, rounds = 0, [list(x) for x in np.array_split(np.arange(model.layers), min(self.rounds, model.layers))]
        for of_round in rounds:
            found = grams(model, tree.unflatten(weights), batches)
            for path, index in (job for number in of_round for job in jobs[number]):
                self._one(path, index, quantizers[path], weights, parts[path], found)
                done += 1
                progress("matrices", done, sum(map(len, jobs)))
        rounded = {path: Packed(p.codes(), quantizers[path].grid, p.blocks, axes[path]) for path, p in parts.items()}
        return tables | rounded

    def _one(
        self, path: str, index: int, quantizer: Quantizer, weights: dict[str, np.ndarray], part: _Parts, found: Grams
    ) -> None:
        matrix = part.matrix(weights[path][index])
        codes, steps, zeros = gptq(quantizer, matrix, found.of(path)[index], part.group, self.search)
        part.put(index, codes, steps, zeros)
        scale = np.repeat(steps, matrix.shape[1] // steps.shape[1], axis=1)
        shift = 0 if zeros is None else np.repeat(zeros, matrix.shape[1] // steps.shape[1], axis=1)
        weights[path][index] = part.back(scale * (codes - shift + np.float32(quantizer.grid.offset)))


@dataclass(kw_only=True)
class _Parts:
    """The codes of one stacked parameter, filled layer by layer; matrices are [out, in]."""

    blocks: Blocks
    inputs: int
    group: int | None
    taken: np.ndarray
    steps: np.ndarray
    zeros: np.ndarray | None = None

    @staticmethod
    def of(path: str, quantizer: Quantizer, shape: tuple[int, ...], axes: Axes) -> _Parts:
        cut = sides(axes, path)
        if cut.stacked != (0,) or isinstance(quantizer.granularity, PerTensor):
            raise UserError(f"{path}: GPTQ rounds matrices stacked by layer, with a scale for each channel or group")
        blocks = quantizer.granularity.cut(shape, axes, path)
        inputs = int(np.prod([shape[i] for i in cut.inputs]))
        steps = np.empty((shape[0], *blocks.scales[1:]), np.float32)
        return _Parts(blocks=blocks, inputs=inputs, group=blocks.group, taken=np.empty(shape, np.int16), steps=steps)

    def matrix(self, w: np.ndarray) -> np.ndarray:
        """[inputs..., outputs...] -> [out, in]."""
        return w.reshape(self.inputs, -1).T

    def back(self, matrix: np.ndarray) -> np.ndarray:
        """[out, in] -> [inputs..., outputs...]."""
        return np.ascontiguousarray(matrix.T).reshape(self.blocks.shape[1:])

    def put(self, index: int, codes: np.ndarray, steps: np.ndarray, zeros: np.ndarray | None) -> None:
        self.taken[index] = self.back(codes)
        self.steps[index] = steps.T.reshape(self.steps.shape[1:])
        if zeros is not None:
            self.zeros = np.empty(self.steps.shape, np.int16) if self.zeros is None else self.zeros
            self.zeros[index] = zeros.T.reshape(self.steps.shape[1:])

    def codes(self) -> Codes:
        return Codes(self.taken, self.steps, self.zeros)


def _axes(model: Assembly) -> dict[str, Axes]:
    return tree.flatten(model.axes(), is_leaf=tree.is_axes)


def _jobs(model: Assembly, paths: Iterable[str]) -> list[list[tuple[str, int]]]:
    """For each layer of the model, the (path, index on its layer axis) of its parameters among `paths`."""
    jobs: list[list[tuple[str, int]]] = [[] for _ in range(model.layers)]
    for path in paths:
        for place in (p for p in model.places() if path.startswith(f"{p.path}/")):
            for index, number in enumerate(place.numbers):
                jobs[number].append((path, index))
    return jobs


def bits_a_weight(packed: Mapping[str, Packed]) -> float:
    """Mean bits of the quantized weights: their codes, and 16 for each step."""
    total = sum(p.codes.steps.size * 16 + np.prod(p.blocks.shape) * width(p.grid.levels) for p in packed.values())
    return float(total / sum(np.prod(p.blocks.shape) for p in packed.values()))


METHODS: Mapping[str, Method] = {
    "rtn": RTN(),
    "rtn-mse": RTN(search=least_error),
    "gptq": GPTQ(),
}
"""What `slmjax quantize --method` takes"""
