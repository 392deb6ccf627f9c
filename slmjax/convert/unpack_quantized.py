"""Reads folders in the format `pack-quantized` of compressed-tensors: its matrices as float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from slmjax.convert.pack_quantized import FORMAT, METHOD, PACKED, SCALE, SHAPE, ZERO, unpack, words
from slmjax.convert.safetensors_io import Tensors
from slmjax.errors import StorageError, UserError

GROUPS = 1000
"""More groups than any model has"""


class Unpacked(Mapping[str, np.ndarray]):
    """The tensors of a folder, packed matrices under the key of the matrix, float32. Each is unpacked at every access.

    Raises:
        UserError: the weights are quantized in another way; the message names the field.
        StorageError: the arrays of a matrix do not fit each other.
    """

    def __init__(self, tensors: Tensors, quantization: Any):
        """quantization: `quantization_config` of config.json."""
        self._tensors = tensors
        possible = kinds_of(quantization)
        self._packed: dict[str, int] = {}  # matrix -> bits
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Key -> shape, without reading any matrix"""
        for key, shape in tensors.shapes.items():
            module, _, last = key.rpartition(".")
            if last == PACKED:
                if f"{module}.weight" in tensors.shapes:
                    raise StorageError(f"{module}.weight is stored both packed and as floats")
                self._packed[module], self.shapes[f"{module}.weight"] = self._described(module, possible)
            elif last not in (SCALE, SHAPE, ZERO) or f"{module}.{PACKED}" not in tensors.shapes:
                self.shapes[key] = shape

    def _described(self, module: str, possible: tuple[Kind, ...]) -> tuple[int, tuple[int, int]]:
        """Bits and shape of a packed matrix. Both follow from the arrays' shapes: no pattern of config.json, which may
        take forever to match, is needed to find them."""
        shapes = self._tensors.shapes
        for last in (SCALE, SHAPE):
            if f"{module}.{last}" not in shapes:
                raise StorageError(f"tensor {module}.{last} is missing, without which {PACKED} cannot be read")
        shape = self._tensors[f"{module}.{SHAPE}"]
        packed, scale = shapes[f"{module}.{PACKED}"], shapes[f"{module}.{SCALE}"]
        if shape.dtype != np.int64 or shape.shape != (2,) or shape.min() < 1:
            raise StorageError(f"{module}.{SHAPE} is {shape.tolist()}; expected the two dimensions of a matrix")
        out, inputs = map(int, shape)
        zero = shapes.get(f"{module}.{ZERO}")
        fitting = [x.bits for x in possible if packed == (out, words(inputs, x.bits)) and x.zeros == (zero is not None)]
        if len(fitting) != 1:
            raise StorageError(
                f"{module}.{PACKED} of shape {list(packed)} {'with' if zero else 'without'} {ZERO} is not a matrix "
                f"{[out, inputs]} in {' or '.join(map(str, possible))}, or could be several (compressed-tensors before "
                "0.17 packs 3, 5, 6 and 7 bits otherwise; save it with a newer one)"
            )
        groups = scale[-1] if len(scale) == 2 else 1
        if scale not in ((1,), (out, groups)) or groups < 1 or inputs % groups:
            raise StorageError(f"{module}.{SCALE} has shape {list(scale)}, which does not fit a matrix {[out, inputs]}")
        if zero is not None and (zero != (words(out, fitting[0]), groups) or scale == (1,)):
            raise StorageError(f"{module}.{ZERO} has shape {list(zero)}, which does not fit {SCALE} {list(scale)}")
        for last in (PACKED, *([] if zero is None else [ZERO])):
            if (found := self._tensors.described[f"{module}.{last}"].dtype) != "I32":
                raise StorageError(f"{module}.{last} is {found}; expected I32")
        return fitting[0], (out, inputs)

    def __getitem__(self, key: str) -> np.ndarray:
        module = key.removesuffix(".weight")
        if module not in self._packed or module == key:
            if key not in self.shapes:
                raise KeyError(key)
            return self._tensors[key]
        names = {last: f"{module}.{last}" for last in (PACKED, SCALE, SHAPE, ZERO)}
        arrays = {last: self._tensors[name] for last, name in names.items() if name in self._tensors}
        return unpack(arrays, self._packed[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes


class Kind(NamedTuple):
    """How config.json says that some of the matrices are quantized."""

    bits: int
    zeros: bool
    """Whether there are zero points"""

    def __str__(self) -> str:
        return f"int{self.bits}{' with zero points' if self.zeros else ''}"


def kinds_of(quantization: Any) -> tuple[Kind, ...]:
    """The kinds in a `quantization_config`.

    Raises:
        UserError: it is not plain `pack-quantized`: another method, rounded activations or caches, transforms.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UserError(
            f"config.json: quantization_config.quant_method = {str(method)[:80]!r} cannot be imported; only {METHOD} "
            f"({FORMAT}) can: import the model that was quantized"
        )
    _only(quantization, "quantization_config", format=(FORMAT,), quantization_status=("compressed",))
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(name):
            raise UserError(f"config.json: quantization_config.{name} is set, which slmjax does not read")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= GROUPS:
        raise UserError("config.json: quantization_config.config_groups is not a dictionary of groups")
    kinds: set[Kind] = set()
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{str(name)[:80]}"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise UserError(f"config.json: {where}.weights is missing")
        for activations in ("input_activations", "output_activations"):
            if group.get(activations):
                raise UserError(f"config.json: {where}.{activations} is set; only quantized weights can be imported")
        _only(group, where, format=(FORMAT, None))
        strategies = ("tensor", "channel", "group")
        _only(weights, f"{where}.weights", type=("int", None), num_bits=range(1, 9), strategy=strategies)
        kinds.add(Kind(weights["num_bits"], not weights.get("symmetric", True)))
    return tuple(sorted(kinds))


def _only(values: Mapping[str, Any], where: str, **allowed: Any) -> None:
    for name, expected in allowed.items():
        value = values.get(name)
        if isinstance(value, bool | float) or value not in expected:
            listed = ", ".join(str(x) for x in expected if x is not None)
            raise UserError(f"config.json: {where}.{name} = {str(value)[:80]!r} cannot be imported; expected {listed}")
