"""Recovers the named scaling of rotary frequencies (linear, llama3) from the factors in a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slmjax.convert.gguf.arch import llama3_factors
from slmjax.convert.gguf.file import GGUF, shown
from slmjax.errors import StorageError, UserError

ORIGINAL = 8192
"""Context before the scaling, of Llama 3.1 to 3.3"""


def scaling_of(file: GGUF, left: dict[str, Any], theta: float, size: int) -> dict[str, Any]:
    """`rope_parameters` without the base. Removes the keys that it reads from `left`. `size`: width of a head.

    Raises:
        UserError: the scaling is not supported.
        StorageError: the factors have another shape.
    """
    kind = left.pop("rope.scaling.type", "linear")  # llama.cpp takes a factor without a type as linear
    older = left.pop("rope.scale_linear", 1.0)
    factor = left.pop("rope.scaling.factor", older)
    original = left.pop("rope.scaling.original_context_length", ORIGINAL)
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise UserError(f"llama.rope.scaling.type = {shown(kind)} is not supported; expected none or linear")
    for key, value in (("factor", factor), ("original_context_length", original)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise StorageError(f"{file.file}: llama.rope.scaling.{key} = {shown(value)}; expected a positive number")
    linear = kind == "linear" and factor != 1.0
    if "rope_freqs.weight" not in file.infos:
        return {"rope_type": "linear", "factor": float(factor)} if linear else {"rope_type": "default"}
    if linear:
        raise UserError("llama.rope.scaling.type = 'linear' with a tensor 'rope_freqs.weight' is not supported")
    if file.infos["rope_freqs.weight"].shape != (size // 2,):
        found = list(file.infos["rope_freqs.weight"].shape)
        raise StorageError(f"{file.file}: tensor 'rope_freqs.weight' has shape {found}; expected {[size // 2]}")
    factors = file["rope_freqs.weight"]
    if np.all(factors == 1):
        return {"rope_type": "default"}
    for candidate in _candidates(factors, theta, size, original):
        config = {"rope_parameters": {"rope_theta": theta, **candidate}, "head_dim": size}
        if np.allclose(llama3_factors(config)["rope_freqs.weight"], factors, rtol=1e-6, atol=0):
            return candidate
    raise UserError("tensor 'rope_freqs.weight' is not a llama3 scaling; no other is supported")


def _candidates(factors: np.ndarray, theta: float, size: int, original: float) -> list[dict[str, Any]]:
    """llama3 scalings that could give these factors: Llama's own, and one fitted to the factors between the extremes.

    1 / factor is linear in the blend, and the blend is linear in 1 / wavelength, so that two points determine the line.
    It determines only low/original and high/original; `original` is taken from the file.
    """
    full = float(factors.max())

    def scaling(low: float, high: float) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": full,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }

    wavelength = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    with np.errstate(divide="ignore", invalid="ignore"):
        blend = (1 / factors.astype(np.float64) - 1 / full) / (1 - 1 / full)
    inside = np.flatnonzero((blend > 1e-6) & (blend < 1 - 1e-6))
    found = [scaling(1.0, 4.0)]
    if len(inside) >= 2:
        slope, start = np.polyfit(1 / wavelength[inside], blend[inside], 1)
        low, high = -start * original / slope, (1 - start) * original / slope
        if 0 < low < high:
            found += [scaling(float(round(low, 3)), float(round(high, 3))), scaling(float(low), float(high))]
    return found
