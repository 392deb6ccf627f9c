"""Which file formats hold the weights that an experiment rounds, exactly: known before it is trained."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from slmjax import tree
from slmjax.compress.quant.blocks import PerTensor, sides
from slmjax.compress.quant.float4 import Float4
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import chosen, quantizes
from slmjax.config import Experiment
from slmjax.convert import pack_quantized
from slmjax.convert.gguf.carriers import carrier_of
from slmjax.convert.pack_float4 import Float4Carrier
from slmjax.convert.packed import PackedTensor
from slmjax.errors import UserError
from slmjax.models.assembly import is_declared
from slmjax.optim.matrices import matrix


class Carried(NamedTuple):
    """How one format stores one parameter."""

    name: str
    """Of the carrier, such as Q2_K; empty if there is none"""
    bits: float
    """Bits a weight in the file, scales included; 0 if there is none"""
    reason: str = ""
    """Why there is none"""


class Fit(NamedTuple):
    """How a quantized parameter can be stored."""

    path: str
    weights: int
    hf: Carried
    """In a Hugging Face folder (floats of 4 bits: of bfloat16)"""
    gguf: Carried


class Size(NamedTuple):
    """What a model takes in one format."""

    bits: float
    """Bits of a quantized weight, scales included; those of the dtype if nothing is quantized"""
    bytes: int
    """Of all tensors: tables and norms too"""


def fits(experiment: Experiment, dtype: str = "float32") -> list[Fit]:
    """How each parameter that the experiment rounds can be stored exactly; empty if it rounds none.

    Args:
        dtype: of the Hugging Face folder, which is that of its scales.

    Raises:
        UserError: a rule matches no parameter, or groups that do not divide the inputs.
    """
    model, found = experiment.model, {}
    axes = tree.flatten(model.axes(), is_leaf=tree.is_axes)
    shapes = {path: tuple(x.value.shape) for path, x in tree.flatten(model.declared(), is_leaf=is_declared).items()}
    for view in quantizes(experiment.view):
        for path, quantizer in chosen(model.axes(), view.rules).items():
            found[path] = Fit(
                path, math.prod(shapes[path]), *_carried(path, quantizer, shapes[path], axes[path], dtype)
            )
    return list(found.values())


def sizes(experiment: Experiment, dtype: str = "float16") -> dict[str, Size]:
    """{"Hugging Face" and "GGUF": the size of the trained model}, without a format that does not hold it exactly.

    Args:
        dtype: "float16" or "float32", of scales in a Hugging Face folder and of what is not quantized.

    Raises:
        UserError: as `fits`.
    """
    found, each = fits(experiment, dtype), {"float16": 2, "float32": 4}[dtype]
    rounded = {fit.path for fit in found}
    declared = tree.flatten(experiment.model.declared(), is_leaf=is_declared).items()
    axes = tree.flatten(experiment.model.axes(), is_leaf=tree.is_axes)
    rest = {path: math.prod(x.value.shape) for path, x in declared if path not in rounded}
    vectors = sum(n for path, n in rest.items() if matrix(axes[path], path) is None)  # llama.cpp keeps them in float32
    weights, out = sum(fit.weights for fit in found), {}
    for name, carried, extra in (
        ("Hugging Face", [fit.hf for fit in found], 0),
        ("GGUF", [fit.gguf for fit in found], vectors * (4 - each)),
    ):
        if all(c.name for c in carried):
            packed = sum(c.bits * fit.weights for c, fit in zip(carried, found, strict=True))
            total = packed / 8 + sum(rest.values()) * each + extra
            out[name] = Size(packed / weights if weights else 8.0 * each, round(total))
    return out


def check(experiment: Experiment) -> None:
    """
    Raises:
        UserError: a parameter would be rounded to a grid that no format stores exactly.
    """
    for fit in fits(experiment):
        if not (fit.hf.name or fit.gguf.name):
            raise UserError(
                f"view: no file format holds {fit.path} exactly as it would be trained. compressed-tensors: "
                f"{fit.hf.reason}. llama.cpp: {fit.gguf.reason}"
            )


def lines(found: list[Fit]) -> tuple[str, ...]:
    """A line for each format: `int3 (7 parameters), 3.1 bits a weight`, or why a parameter does not fit."""
    out = []
    for format, each in (("Hugging Face", [fit.hf for fit in found]), ("GGUF", [fit.gguf for fit in found])):
        if missing := [carried.reason for carried in each if not carried.name]:
            out.append(f"{format}: cannot hold {len(missing)} of {len(found)}: {missing[0]}")
            continue
        names = ", ".join(f"{name} ({n})" for name, n in Counter(carried.name for carried in each).items())
        bits = sum(c.bits * fit.weights for c, fit in zip(each, found, strict=True)) / sum(fit.weights for fit in found)
        out.append(f"{format}: {names}, {bits:.2f} bits a weight")
    return tuple(out)


def _carried(path: str, quantizer: Quantizer, shape: tuple[int, ...], axes: Any, dtype: str) -> tuple[Carried, Carried]:
    blocks, cut = quantizer.granularity.cut(shape, axes, path), sides(axes, path)
    width, rows = (math.prod(shape[i] for i in side) for side in (cut.inputs, cut.outputs))
    groups = 1 if blocks.group is None else width // blocks.group
    # two rows stand for all: what a carrier holds depends on the grid, the width and the scales
    steps = np.full((2, groups), 2.0**-8, np.float32)
    steps[1] *= 1.0 if isinstance(quantizer.granularity, PerTensor) else 2.0
    zeros = np.zeros(steps.shape, np.int16) if quantizer.shifts else None
    tensor = PackedTensor(np.full((2, width), quantizer.grid.low, np.int16), steps, zeros, quantizer.grid)
    return _of_hf(path, tensor, (rows, width), dtype), _of_gguf(path, tensor, quantizer)


def _of_hf(path: str, tensor: PackedTensor, shape: tuple[int, int], dtype: str) -> Carried:
    try:
        carrier = pack_quantized.carrier(path, tensor)
    except UserError as e:
        return Carried("", 0.0, str(e))
    name = carrier.name if isinstance(carrier, Float4Carrier) else f"int{carrier.bits}"
    return Carried(name, carrier.bytes(shape, dtype) * 8 / math.prod(shape))


def _of_gguf(path: str, tensor: PackedTensor, quantizer: Quantizer) -> Carried:
    if quantizer.scale_type != "float16" and not isinstance(quantizer.grid, Float4):
        return Carried("", 0.0, f"{path} has scales of type {quantizer.scale_type}; llama.cpp's are float16")
    try:
        carrier = carrier_of(path, tensor)
    except UserError as e:
        return Carried("", 0.0, str(e))
    return Carried(carrier.format.name, carrier.format.bits)
