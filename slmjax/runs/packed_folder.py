"""A folder with a model whose weights are stored as codes: config.json, weights.safetensors, tokenizer files.

For each quantized parameter, the file holds `PATH:codes` (uint8, the bits of all codes one after another, lowest bit
first), `PATH:steps` and, where there are zero points, `PATH:zeros`; for others, `PATH` in float32. config.json says
what the codes mean.
"""

from __future__ import annotations

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
from slmjax.compress.quant.blocks import Blocks
from slmjax.compress.quant.grids import Codes
from slmjax.compress.quant.view import Packed
from slmjax.errors import StorageError
from slmjax.models.assembly import Assembly, is_declared
from slmjax.serialise import from_json, to_json
from slmjax.types import Params

WEIGHTS = "weights.safetensors"
KEY = "packed"
"""Of config.json: {path: what its codes mean}"""


def width(levels: int) -> int:
    """Bits a code."""
    return math.ceil(math.log2(levels))


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers in [0, 2^bits) -> uint8 [ceil(n bits / 8)], lowest bit first."""
    each = np.unpackbits(codes.reshape(-1, 1).astype(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 [count]."""
    each = np.unpackbits(packed, count=bits * count, bitorder="little").reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


def _narrow(steps: np.ndarray) -> np.ndarray:
    """Steps in the shortest type that holds them exactly."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        if np.array_equal(steps.astype(dtype).astype(np.float32), steps):
            return steps.astype(dtype)
    return steps


def write(folder: Path, model: Assembly, params: Params, packed: Mapping[str, Packed], about: Mapping[str, Any]) -> int:
    """Writes config.json and the weights into an existing folder; returns the bytes of the weights."""
    tensors, meaning = {}, {}
    for path, x in tree.flatten(params).items():
        if path not in packed:
            tensors[path] = np.ascontiguousarray(x, np.float32)
            continue
        p = packed[path]
        bits = width(p.grid.levels)
        tensors[f"{path}:codes"] = pack_bits(np.asarray(p.codes.codes) - p.grid.low, bits)
        tensors[f"{path}:steps"] = _narrow(np.asarray(p.codes.steps, np.float32))
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


def read(folder: Path, config: Mapping[str, Any]) -> tuple[Assembly, Params, dict[str, Packed]]:
    """The model, its parameters (float32; those quantized have the values of their codes) and the codes.

    Raises:
        StorageError: the file is damaged, or does not fit config.json.
    """
    model: Assembly = from_json(config["model"])
    axes = tree.flatten(model.axes(), is_leaf=tree.is_axes)
    shapes = {path: tuple(x.value.shape) for path, x in tree.flatten(model.declared(), is_leaf=is_declared).items()}
    params, packed = {}, {}
    try:
        with safe_open(folder / WEIGHTS, "numpy") as file:
            for path, shape in shapes.items():
                meaning = config[KEY].get(path)
                if meaning is None:
                    params[path] = file.get_tensor(path).reshape(shape)
                    continue
                blocks = Blocks(shape, tuple(meaning["blocked"]), tuple(meaning["over"]), meaning["group"])
                grid = from_json(meaning["grid"])
                codes = unpack_bits(file.get_tensor(f"{path}:codes"), width(grid.levels), math.prod(shape))
                codes = codes.reshape(shape).astype(np.int16) + np.int16(grid.low)
                steps = file.get_tensor(f"{path}:steps").astype(np.float32).reshape(blocks.scales)
                has_zeros = f"{path}:zeros" in file.keys()  # noqa: SIM118  a safetensors file is no dict
                zeros = file.get_tensor(f"{path}:zeros").astype(np.int16) if has_zeros else None
                packed[path] = Packed(Codes(codes, steps, zeros), grid, blocks, axes[path])
                params[path] = packed[path].values()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise StorageError(f"{folder / WEIGHTS} is damaged or does not fit config.json: {e}") from e
    return model, tree.unflatten(params), packed
