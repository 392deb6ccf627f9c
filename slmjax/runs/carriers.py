"""Which file formats hold the weights that an experiment rounds, exactly: known before it is trained."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from slmjax import tree
from slmjax.compress.quant.blocks import PerTensor, sides
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.view import chosen, quantizes
from slmjax.config import Experiment
from slmjax.convert import pack_quantized
from slmjax.convert.gguf.carriers import carrier_of
from slmjax.convert.packed import PackedTensor
from slmjax.errors import UserError
from slmjax.models.assembly import is_declared


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
    """In a Hugging Face folder of float32"""
    gguf: Carried


def fits(experiment: Experiment) -> list[Fit]:
    """How each parameter that the experiment rounds can be stored exactly; empty if it rounds none.

    Raises:
        UserError: a rule matches no parameter, or groups that do not divide the inputs.
    """
    model, found = experiment.model, {}
    axes = tree.flatten(model.axes(), is_leaf=tree.is_axes)
    shapes = {path: tuple(x.value.shape) for path, x in tree.flatten(model.declared(), is_leaf=is_declared).items()}
    for view in quantizes(experiment.view):
        for path, quantizer in chosen(model.axes(), view.rules).items():
            found[path] = Fit(path, math.prod(shapes[path]), *_carried(path, quantizer, shapes[path], axes[path]))
    return list(found.values())


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


def _carried(path: str, quantizer: Quantizer, shape: tuple[int, ...], axes: Any) -> tuple[Carried, Carried]:
    blocks, cut = quantizer.granularity.cut(shape, axes, path), sides(axes, path)
    width, rows = (math.prod(shape[i] for i in side) for side in (cut.inputs, cut.outputs))
    groups = 1 if blocks.group is None else width // blocks.group
    # two rows stand for all: what a carrier holds depends on the grid, the width and the scales
    steps = np.full((2, groups), 2.0**-8, np.float32)
    steps[1] *= 1.0 if isinstance(quantizer.granularity, PerTensor) else 2.0
    zeros = np.zeros(steps.shape, np.int16) if quantizer.shifts else None
    tensor = PackedTensor(np.full((2, width), quantizer.grid.low, np.int16), steps, zeros, quantizer.grid)
    return _of_hf(path, tensor, (rows, width)), _of_gguf(path, tensor, quantizer)


def _of_hf(path: str, tensor: PackedTensor, shape: tuple[int, int]) -> Carried:
    try:
        carrier = pack_quantized.carrier(path, tensor)
    except UserError as e:
        return Carried("", 0.0, str(e))
    return Carried(f"int{carrier.bits}", carrier.bytes(shape, "float32") * 8 / math.prod(shape))


def _of_gguf(path: str, tensor: PackedTensor, quantizer: Quantizer) -> Carried:
    if quantizer.scale_type != "float16":
        return Carried("", 0.0, f"{path} has scales of type {quantizer.scale_type}; llama.cpp's are float16")
    try:
        carrier = carrier_of(path, tensor)
    except UserError as e:
        return Carried("", 0.0, str(e))
    return Carried(carrier.format.name, carrier.format.bits)
