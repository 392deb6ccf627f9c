"""What the methods of post-training quantization share: their interface, and matrices filled layer by layer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from slmjax import tree
from slmjax.compress.ptq.rtn import Search, nearest
from slmjax.compress.quant.blocks import Axes, Blocks, PerTensor, sides
from slmjax.compress.quant.grids import Codes
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import Packed, Rule
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.types import Batch, Params

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


def silent(what: str, done: int, of: int) -> None:
    """No progress."""


class Rounded(NamedTuple):
    """A model after a method."""

    params: Params
    """All parameters, float32; those that are rounded have the values of their codes"""
    packed: dict[str, Packed]
    """{path: codes}"""


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How weights are rounded after training."""

    reads_data: ClassVar[bool] = False
    """Whether it needs calibration data"""

    @abc.abstractmethod
    def __call__(
        self, model: Assembly, params: Params, rules: tuple[Rule, ...], batches: tuple[Batch, ...], progress: Progress
    ) -> Rounded:
        """The model, its parameters that `rules` name rounded.

        Args:
            batches: calibration data; a method that needs none ignores them.
        """


@dataclass(kw_only=True)
class Parts:
    """The codes of one stacked parameter, filled layer by layer; matrices are [out, in]."""

    blocks: Blocks
    inputs: int
    group: int | None
    taken: np.ndarray
    steps: np.ndarray
    zeros: np.ndarray | None = None

    @staticmethod
    def of(path: str, quantizer: Quantizer, shape: tuple[int, ...], axes: Axes) -> Parts:
        cut = sides(axes, path)
        if cut.stacked != (0,) or isinstance(quantizer.granularity, PerTensor):
            raise UserError(f"{path}: GPTQ and AWQ round matrices of layers, with a scale for each channel or group")
        blocks = quantizer.granularity.cut(shape, axes, path)
        inputs = int(np.prod([shape[i] for i in cut.inputs]))
        steps = np.empty((shape[0], *blocks.scales[1:]), np.float32)
        return Parts(blocks=blocks, inputs=inputs, group=blocks.group, taken=np.empty(shape, np.int16), steps=steps)

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

    def packed(self, quantizer: Quantizer, axes: Axes) -> Packed:
        return Packed(Codes(self.taken, self.steps, self.zeros), quantizer.grid, self.blocks, axes)


def tables_of(
    quantizers: Mapping[str, Quantizer],
    inside: Container[str],
    weights: Mapping[str, np.ndarray],
    axes: Mapping[str, Axes],
    search: Search,
) -> dict[str, Packed]:
    """The parameters outside the layers, each to nearest."""
    outside = {path: quantizer for path, quantizer in quantizers.items() if path not in inside}
    return {path: to_nearest(path, q, weights[path], axes[path], search) for path, q in outside.items()}


def axes_of(model: Assembly) -> dict[str, Axes]:
    return tree.flatten(model.axes(), is_leaf=tree.is_axes)


def jobs_of(model: Assembly, paths: Iterable[str]) -> list[list[tuple[str, int]]]:
    """For each layer of the model, the (path, index on its layer axis) of its parameters among `paths`."""
    jobs: list[list[tuple[str, int]]] = [[] for _ in range(model.layers)]
    for path in paths:
        for place in (p for p in model.places() if path.startswith(f"{p.path}/")):
            for index, number in enumerate(place.numbers):
                jobs[number].append((path, index))
    return jobs


def to_nearest(path: str, quantizer: Quantizer, w: Any, axes: Axes, search: Search) -> Packed:
    blocks = quantizer.granularity.cut(tuple(w.shape), axes, path)
    return Packed(nearest(quantizer, jnp.asarray(w), blocks, search), quantizer.grid, blocks, axes)
