"""A folder with a model whose weights are stored as codes: config.json, weights.safetensors, tokenizer files.

For each quantized parameter, the file holds `PATH:codes` (uint8, the bits of all codes one after another, lowest bit
first), `PATH:steps` and, where there are zero points, `PATH:zeros`; for others, `PATH` in float32. Steps of floats of
4 bits take 8 bits each: exponents of two plus 127, or float8_e4m3fn in units of a float32 `PATH:unit`. config.json says
what the codes mean.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slmjax import tree
from slmjax.compress.quant.bits import pack_bits, unpack_bits
from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.float4 import Float4, scale_of_matrix
from slmjax.compress.quant.in_memory import width
from slmjax.compress.quant.into_memory import in_memory, narrow
from slmjax.compress.quant.view import Packed
from slmjax.errors import StorageError
from slmjax.models.assembly import Assembly, is_declared
from slmjax.nn.encoded import is_encoded
from slmjax.serialise import from_json, to_json
from slmjax.types import Params

WEIGHTS = "weights.safetensors"
KEY = "packed"
"""Of config.json: {path: what its codes mean}"""


def steps_of(p: Packed) -> dict[str, np.ndarray]:
    """The steps as they are stored, in the shortest type that holds them exactly, by what follows the path."""
    steps = np.asarray(p.codes.steps, np.float32)
    if isinstance(p.grid, Float4):
        mantissa, exponent = np.frexp(steps)
        if (mantissa == 0.5).all() and exponent.min() > -126:
            return {":steps": (exponent + 126).astype(np.uint8)}
        if (unit := scale_of_matrix(steps / 2)) is not None:
            return {
                ":steps": (steps / unit).astype(ml_dtypes.float8_e4m3fn).view(np.uint8),
                ":unit": np.array([unit], np.float32),
            }
    return {":steps": narrow(steps)}


def _steps(steps: np.ndarray, unit: np.ndarray | None) -> np.ndarray:
    """The inverse of `steps_of`, float32."""
    if steps.dtype != np.uint8:
        return steps.astype(np.float32)
    if unit is None:
        return np.ldexp(np.float32(1), steps.astype(np.int32) - 127)
    return steps.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit


def write(folder: Path, model: Assembly, params: Params, packed: Mapping[str, Packed], about: Mapping[str, Any]) -> int:
    """Writes config.json and the weights into an existing folder; returns the bytes of the weights.

    Args:
        params: those in `packed` are not looked at.
    """
    tensors, meaning = {}, {}
    for path, x in tree.flatten(params, is_leaf=is_encoded).items():
        if path not in packed:
            tensors[path] = np.ascontiguousarray(x, np.float32)
            continue
        p = packed[path]
        bits = width(p.grid.levels)
        tensors[f"{path}:codes"] = pack_bits(np.searchsorted(p.grid.codes, np.ravel(p.codes.codes)), bits)
        tensors |= {path + end: x for end, x in steps_of(p).items()}
        if p.codes.zeros is not None:
            tensors[f"{path}:zeros"] = np.asarray(p.codes.zeros).astype(np.uint8)
        meaning[path] = {
            "grid": to_json(p.grid),
            "blocked": p.blocks.blocked,
            "over": p.blocks.over,
            "group": p.blocks.group,
        }
    save_file(tensors, folder / WEIGHTS)
    described = {"format": 1, "model": to_json(model), KEY: meaning, **about}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    return (folder / WEIGHTS).stat().st_size


def read(folder: Path, config: Mapping[str, Any]) -> tuple[Assembly, Params]:
    """The model, and its parameters as numpy arrays: float32, those quantized `compress.quant.in_memory.InMemory`.

    No weight that is stored as a code becomes a float, and few codes at a time are read.

    Raises:
        StorageError: the file is damaged, or does not fit config.json.
    """
    model: Assembly = from_json(config["model"])
    axes = tree.flatten(model.axes(), is_leaf=tree.is_axes)
    shapes = {path: tuple(x.value.shape) for path, x in tree.flatten(model.declared(), is_leaf=is_declared).items()}
    params: dict[str, Any] = {}
    try:
        with safe_open(folder / WEIGHTS, "numpy") as file:
            names = set(file.keys())
            for path, shape in shapes.items():
                meaning = config[KEY].get(path)
                if meaning is None:
                    params[path] = file.get_tensor(path).reshape(shape)
                    continue
                blocks = Blocks(shape, tuple(meaning["blocked"]), tuple(meaning["over"]), meaning["group"])
                grid = from_json(meaning["grid"])
                unit = file.get_tensor(f"{path}:unit") if f"{path}:unit" in names else None
                steps = _steps(file.get_tensor(f"{path}:steps"), unit).reshape(blocks.scales)
                zeros = file.get_tensor(f"{path}:zeros") if f"{path}:zeros" in names else None
                stored = file.get_slice(f"{path}:codes")
                bits = width(grid.levels)
                if (size := stored.get_shape()) != [math.ceil(math.prod(shape) * bits / 8)]:
                    raise ValueError(f"{path}:codes has the shape {size}")
                params[path] = in_memory(blocks, axes[path], grid, steps, zeros, functools.partial(_some, stored, bits))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise StorageError(f"{folder / WEIGHTS} is damaged or does not fit config.json: {e}") from e
    return model, tree.unflatten(params)


def _some(stored: Any, bits: int, first: int, count: int) -> np.ndarray:
    """So many codes from the first on."""
    start = first * bits
    packed = stored[start // 8 : math.ceil((start + count * bits) / 8)]
    return unpack_bits(packed, bits, count, start % 8)
