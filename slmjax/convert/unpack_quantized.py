"""Reads folders in the formats `pack-quantized`, `mxfp4-pack-quantized` and `nvfp4-pack-quantized` of
compressed-tensors: their matrices as float32, or as codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from slmjax.compress.quant.grids import Nearest
from slmjax.convert import pack_float4
from slmjax.convert.coded import Coded
from slmjax.convert.pack_float4 import FORMATS, GLOBAL
from slmjax.convert.pack_quantized import FORMAT, METHOD, MIXED, PACKED, SCALE, SHAPE, ZERO, unpack, unpack_codes, words
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
        self._packed: dict[str, int | None] = {}  # matrix -> bits; None: floats of 4 bits
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Key -> shape, without reading any matrix"""
        for key, shape in tensors.shapes.items():
            module, _, last = key.rpartition(".")
            if last == PACKED:
                if f"{module}.weight" in tensors.shapes:
                    raise StorageError(f"{module}.weight is stored both packed and as floats")
                self._packed[module], self.shapes[f"{module}.weight"] = self._described(module, possible)
            elif last not in (SCALE, SHAPE, ZERO, GLOBAL) or f"{module}.{PACKED}" not in tensors.shapes:
                self.shapes[key] = shape

    def _described(self, module: str, possible: tuple[Kind, ...]) -> tuple[int | None, tuple[int, int]]:
        """Bits (None: floats of 4 bits) and shape of a packed matrix. Both follow from the arrays' types and shapes: no
        pattern of config.json, which may take forever to match, is needed to find them."""
        shapes = self._tensors.shapes
        if self._tensors.described[f"{module}.{PACKED}"].dtype == "U8":
            return None, self._of_floats(module, possible)
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

    def _of_floats(self, module: str, possible: tuple[Kind, ...]) -> tuple[int, int]:
        """The shape of a matrix of floats of 4 bits."""
        described = self._tensors.described
        found = {
            last: described[f"{module}.{last}"] for last in (PACKED, SCALE, GLOBAL) if f"{module}.{last}" in described
        }
        name = "NVFP4" if GLOBAL in found else "MXFP4"
        if Kind(4, False, name) not in possible:
            raise StorageError(f"{module}.{PACKED} is {name}, but config.json has {' or '.join(map(str, possible))}")
        shape = found[PACKED].shape
        out, inputs = (shape[0], 2 * shape[1]) if len(shape) == 2 else (0, 0)
        scales = (out, inputs // FORMATS[name][1])
        for last, dtype, expected in (
            (SCALE, "F8_E4M3" if name == "NVFP4" else "U8", scales),
            *([(GLOBAL, "F32", (1,))] if name == "NVFP4" else []),
        ):
            if last not in found:
                raise StorageError(f"tensor {module}.{last} is missing, without which {PACKED} cannot be read")
            if not out or inputs % FORMATS[name][1] or (found[last].dtype, found[last].shape) != (dtype, expected):
                raise StorageError(
                    f"{module}.{last} is {found[last].dtype} {list(found[last].shape)}, which does not fit {PACKED} "
                    f"{list(shape)} in {name}; expected {dtype} {list(expected)}"
                )
        return out, inputs

    def __getitem__(self, key: str) -> np.ndarray:
        module = key.removesuffix(".weight")
        if module not in self._packed or module == key:
            if key not in self.shapes:
                raise KeyError(key)
            return self._tensors[key]
        arrays = self._arrays(module)
        if (bits := self._packed[module]) is not None:
            return unpack(arrays, bits)
        with np.errstate(all="ignore"):  # what is not finite is refused
            x = pack_float4.unpack(arrays)
        if not np.isfinite(x).all():
            raise StorageError(f"{module}.{SCALE} gives weights that are NaN or Inf")
        return x

    def coded(self, key: str) -> Coded | None:
        """A packed matrix as its codes; None if it is not packed, or if scales of its own kind (negative ones, products
        that are rounded twice) make other values of them."""
        module = key.removesuffix(".weight")
        if module not in self._packed or module == key:
            return None
        arrays, bits = self._arrays(module), self._packed[module]
        found = pack_float4.coded(arrays) if bits is None else coded(arrays, bits)
        return found.exactly(self[key])

    def _arrays(self, module: str) -> dict[str, np.ndarray]:
        names = {last: f"{module}.{last}" for last in (PACKED, SCALE, SHAPE, ZERO, GLOBAL)}
        return {last: self._tensors[name] for last, name in names.items() if name in self._tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes


def coded(arrays: Mapping[str, np.ndarray], bits: int) -> Coded:
    """The arrays of one matrix -> its codes."""
    out, inputs = map(int, arrays[SHAPE])
    least = -(2 ** (bits - 1))
    codes = (unpack_codes(arrays[PACKED], bits, inputs) - least).astype(np.uint8)
    scale = arrays[SCALE].astype(np.float32).reshape(-1, arrays[SCALE].shape[-1])
    steps = np.broadcast_to(scale, (out, scale.shape[1]))
    if ZERO not in arrays:
        return Coded(codes, steps, None, Nearest(low=least, high=-least - 1))
    zeros = (unpack_codes(np.ascontiguousarray(arrays[ZERO].T), bits, out).T - least).astype(np.uint8)
    return Coded(codes, steps, zeros, Nearest(low=0, high=2**bits - 1))


class Kind(NamedTuple):
    """How config.json says that some of the matrices are quantized."""

    bits: int
    zeros: bool
    """Whether there are zero points"""
    floats: str = ""
    """MXFP4 or NVFP4; empty: integers"""

    def __str__(self) -> str:
        return self.floats or f"int{self.bits}{' with zero points' if self.zeros else ''}"


def kinds_of(quantization: Any) -> tuple[Kind, ...]:
    """The kinds in a `quantization_config`.

    Raises:
        UserError: it is in none of the formats: another method, rounded activations or caches, transforms.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UserError(
            f"config.json: quantization_config.quant_method = {str(method)[:80]!r} cannot be imported; only {METHOD} "
            f"({FORMAT}) can: import the model that was quantized"
        )
    formats = FORMAT, *(format for format, _ in FORMATS.values())
    _only(quantization, "quantization_config", format=(*formats, MIXED), quantization_status=("compressed",))
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
        _only(group, where, format=(*formats, None))
        if (weights.get("type"), weights.get("num_bits")) == ("float", 4):
            _only(weights, f"{where}.weights", group_size=(16, 32), symmetric=(True, None))
            kinds.add(Kind(4, False, "MXFP4" if weights["group_size"] == 32 else "NVFP4"))
            continue
        strategies = ("tensor", "channel", "group")
        _only(weights, f"{where}.weights", type=("int", None), num_bits=range(1, 9), strategy=strategies)
        kinds.add(Kind(weights["num_bits"], not weights.get("symmetric", True)))
    return tuple(sorted(kinds))


def _only(values: Mapping[str, Any], where: str, **allowed: Any) -> None:
    for name, expected in allowed.items():
        value = values.get(name)
        if isinstance(value, float) or (isinstance(value, bool) and name != "symmetric") or value not in expected:
            listed = ", ".join(str(x) for x in expected if x is not None)
            raise UserError(f"config.json: {where}.{name} = {str(value)[:80]!r} cannot be imported; expected {listed}")
