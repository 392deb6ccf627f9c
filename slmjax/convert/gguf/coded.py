"""Packed tensors of a GGUF file as their codes, where the values of their type are a step times an integer."""

from __future__ import annotations

import numpy as np

from slmjax.compress.quant.float4 import Float4
from slmjax.compress.quant.grids import Nearest
from slmjax.convert.coded import Coded
from slmjax.convert.gguf.carriers import CARRIERS, Affine, Scaled
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.layouts import FORMATS, MXFP4, NVFP4, Q1_0, Multiples, Shifted

LEVELS = {x.format.number: (x.levels[0], x.levels[-1]) for x in CARRIERS if isinstance(x, Scaled)}
"""Number of a type -> its smallest and its largest level"""
MOST = {x.format.number: x.most for x in CARRIERS if isinstance(x, Affine)}
"""Number of a type -> its largest u"""


def read_coded(file: GGUF, name: str) -> Coded | None:
    """A tensor as codes; None if it is not packed, or if its values are not a step times an integer: types with two
    scales, Q2_K and Q4_K, hold other values than those that an export writes.

    Raises:
        StorageError: a value is not finite, or the file has become shorter.
    """
    info = file.infos[name]
    if info.kind not in FORMATS or len(info.shape) != 2:
        return None
    format, codes, scales = FORMATS[info.kind], [], []
    with np.errstate(all="ignore"):  # what is not finite is refused where the values are computed
        for raw in file.rows(name):
            blocks = format.read(raw.reshape(-1, format.size))
            numbers, *rest = _numbers(blocks, info.kind)
            codes.append(numbers.reshape(len(raw), -1))
            scales.append([x.reshape(len(raw), -1) for x in rest])
        joined = [np.concatenate(x) for x in zip(*scales, strict=True)]
        found = (_multiples if len(joined) == 1 else _shifted)(np.concatenate(codes), info.kind, *joined)
        if found is not None and (scale := file.scale_of(name)) is not None:
            found = found._replace(steps=found.steps * scale)
    return None if found is None else found.exactly(file[name])


def _numbers(blocks: Multiples | Shifted, kind: int) -> tuple[np.ndarray, ...]:
    """Codes counted from 0, uint8, and the scales of blocks: d, or d, dmin, times and minus."""
    if isinstance(blocks, Shifted):
        u, times = blocks.u.astype(np.uint8), blocks.times
        return u, *(np.broadcast_to(x, times.shape) for x in (blocks.d, blocks.dmin)), times, blocks.minus
    if kind in (MXFP4.number, NVFP4.number):
        return np.searchsorted(Float4().codes, blocks.levels).astype(np.uint8), blocks.d
    if kind == Q1_0.number:
        return (blocks.levels > 0).astype(np.uint8), blocks.d
    return (blocks.levels.astype(np.int16) - LEVELS[kind][0]).astype(np.uint8), blocks.d


def _multiples(codes: np.ndarray, kind: int, d: np.ndarray) -> Coded:
    if kind in (MXFP4.number, NVFP4.number):
        return Coded(codes, d, None, Float4())
    if kind == Q1_0.number:  # -1 and 1 lie two apart
        return Coded(codes, 2 * d, None, Nearest(low=-1, high=0, offset=0.5))
    low, high = LEVELS[kind]
    return Coded(codes, d, None, Nearest(low=low, high=high))


def _shifted(
    codes: np.ndarray, kind: int, d: np.ndarray, dmin: np.ndarray, times: np.ndarray, minus: np.ndarray
) -> Coded | None:
    """Values `d * (times * u - minus)`, if there is one `times` and both scales are the same."""
    t, m, most = int(times.flat[0]), int(minus.flat[0]), MOST[kind]
    if t == 0 or (times != t).any() or not np.array_equal(d, dmin):
        return None
    steps = np.float32(t) * d
    if not (minus % t).any():
        return Coded(codes, steps, (minus // t).astype(np.uint8), Nearest(low=0, high=most))
    if 2 * m % t or (minus != m).any():
        return None
    low = -(m // t) - 1  # -m / t is half way between integers
    return Coded(codes, steps, None, Nearest(low=low, high=low + most, offset=0.5))
