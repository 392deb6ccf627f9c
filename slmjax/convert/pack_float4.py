"""Floating point weights of 4 bits in compressed-tensors' formats `mxfp4-pack-quantized` and `nvfp4-pack-quantized`.

Each matrix [out, in] is stored as `weight_packed` (uint8, two numbers a byte, the first in the lower bits) and
`weight_scale`: an exponent for each 32 input channels (uint8, E8M0), or a float8_e4m3fn for each 16 and for the whole
matrix `weight_global_scale`, by which the scales are divided: the inverse of what llama.cpp multiplies by.

compressed-tensors 0.20 unpacks to bfloat16, whatever the model is loaded in. The values are exact in it, but stock
transformers (5.23) then fails in a model of float32 or float16, at the first product: so such a file has to be
bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from slmjax.compress.quant.float4 import MAGNITUDES, Float4, scale_of_matrix
from slmjax.convert.coded import Coded
from slmjax.convert.packed import PackedTensor
from slmjax.errors import UserError

PACKED, SCALE, GLOBAL = "weight_packed", "weight_scale", "weight_global_scale"
FORMATS: Mapping[str, tuple[str, int]] = {
    "MXFP4": ("mxfp4-pack-quantized", 32),
    "NVFP4": ("nvfp4-pack-quantized", 16),
}
"""Name of the numbers -> (format of compressed-tensors, input channels that share a scale)"""
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class Float4Carrier:
    """How one matrix of floating point numbers of 4 bits is stored."""

    name: Literal["MXFP4", "NVFP4"]

    @property
    def format(self) -> str:
        return FORMATS[self.name][0]

    @property
    def group(self) -> int:
        return FORMATS[self.name][1]

    @property
    def bits(self) -> int:
        return 4

    @property
    def parts(self) -> tuple[str, ...]:
        """The last parts of the keys of a matrix."""
        return (PACKED, SCALE, GLOBAL) if self.name == "NVFP4" else (PACKED, SCALE)

    def bytes(self, shape: Sequence[int], dtype: str) -> int:
        """All that is stored for a matrix [out, in]."""
        weights = math.prod(shape)
        return weights // 2 + weights // self.group + (4 if self.name == "NVFP4" else 0)

    def scales(self, module: str, tensor: PackedTensor, dtype: str) -> np.ndarray:
        """The scales of the blocks, float32 [out, groups].

        Raises:
            UserError: the file is not bfloat16.
        """
        if dtype != "bfloat16":
            raise UserError(
                f"{module} is in {self.name}, with which stock transformers computes only in bfloat16, but --dtype is "
                f"{dtype}; use --dtype bfloat16 (the {self.name} weights are exact in it), or --format gguf"
            )
        return 2 * np.repeat(tensor.steps, tensor.group // self.group, axis=1)

    def pack(self, module: str, tensor: PackedTensor, dtype: str) -> dict[str, np.ndarray]:
        """The arrays of one matrix, by the last part of their key. Raises as `scales`."""
        scales, packed = self.scales(module, tensor, dtype), pack_e2m1(tensor.codes)
        if self.name == "MXFP4":
            return {PACKED: packed, SCALE: (np.frexp(scales)[1] + 126).astype(np.uint8)}
        of_matrix = scale_of_matrix(tensor.steps)
        assert of_matrix is not None, f"{module} does not fit NVFP4"  # `carrier` has looked
        return {PACKED: packed, SCALE: (scales / of_matrix).astype(E4M3), GLOBAL: np.array([1 / of_matrix], np.float32)}

    def json(self) -> dict[str, Any]:
        """`weights` of a group in config.json."""
        mx = self.name == "MXFP4"
        scales = "torch.uint8" if mx else "torch.float8_e4m3fn"
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group" if mx else "tensor_group",
            "group_size": self.group,
            "dynamic": False,
            "scale_dtype": scales,
            "zp_dtype": scales,
        }

    def __str__(self) -> str:
        return f"{self.name}, a scale for each {self.group} input channels"


def scales(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [out, groups]."""
    if GLOBAL in arrays:
        return arrays[SCALE].astype(np.float32) / arrays[GLOBAL].astype(np.float32)
    return np.ldexp(np.float32(1), arrays[SCALE].astype(np.int32) - 127)


def coded(arrays: Mapping[str, np.ndarray]) -> Coded:
    """The arrays of one matrix -> its codes."""
    with np.errstate(all="ignore"):  # what is not finite is refused where the values are computed
        twice, steps = (2 * unpack_e2m1(arrays[PACKED])).astype(np.int8), scales(arrays) / 2
    return Coded(np.searchsorted(Float4().codes, twice).astype(np.uint8), steps, None, Float4())


def carrier(module: str, tensor: PackedTensor) -> Float4Carrier:
    """The smallest carrier that holds a tensor of the grid `Float4` exactly.

    Raises:
        UserError: there is none.
    """
    if tensor.group % 32 == 0 and (np.frexp(tensor.steps)[0] == 0.5).all():
        return Float4Carrier(name="MXFP4")
    if tensor.group % 16 == 0 and scale_of_matrix(tensor.steps) is not None:
        return Float4Carrier(name="NVFP4")
    raise UserError(
        f"{module}, in floats of 4 bits with a scale for each {tensor.group} of a row, is neither MXFP4 (powers of two "
        "for each 32) nor NVFP4 (E4M3 times a power of two for each 16)"
    )


def pack_e2m1(codes: np.ndarray) -> np.ndarray:
    """Twice the numbers [rows, n], n even -> uint8 [rows, n / 2]."""
    bits = (np.where(codes < 0, 8, 0) + np.searchsorted(MAGNITUDES, np.abs(codes))).astype(np.uint8)
    return bits[:, ::2] | bits[:, 1::2] << 4


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """uint8 [rows, n / 2] -> the numbers, float32 [rows, n]; zero without a sign."""
    bits = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values = np.array(MAGNITUDES, np.float32) / 2
    return np.concatenate([values, np.float32(0) - values])[bits] + np.float32(0)


def unpack(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The arrays of one matrix -> float32 [out, in]: the numbers times the scales of float32, rounded once more if the
    scale of the matrix is no power of two."""
    numbers, steps = unpack_e2m1(arrays[PACKED]), scales(arrays)
    return (numbers.reshape(len(numbers), steps.shape[1], -1) * steps[..., None]).reshape(numbers.shape)
