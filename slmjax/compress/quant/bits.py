"""Codes of a few bits side by side in bytes, without gaps."""

from __future__ import annotations

import numpy as np


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers in [0, 2^bits), [..., n] -> uint8 [..., ceil(n bits / 8)]: bit after bit, the lowest of each first."""
    each = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int, skip: int = 0) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 [..., bytes] -> [..., count]. `skip`: bits before the first code."""
    each = np.unpackbits(packed, axis=-1, count=skip + bits * count, bitorder="little")[..., skip:]
    return np.packbits(each.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
