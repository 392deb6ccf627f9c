"""llama.cpp's packed types: how the weights of a block lie in its bytes. Written from the format's description.

A block is some consecutive weights of a row. `d` is a float16 scale of the block. "Planes": weights that lie `lanes`
apart share a byte, the first of them in its lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Bytes = np.ndarray  # uint8 [blocks, bytes of a block]
Levels = np.ndarray  # integers [blocks, weights of a block]


class Multiples(NamedTuple):
    """Blocks whose values are `d * level`."""

    d: np.ndarray  # float32 [blocks, scales of a block]
    levels: Levels

    def values(self) -> np.ndarray:
        """float32 [blocks, weights of a block]; a level of 0 gives +0, also where d is negative."""
        d = np.repeat(self.d, self.levels.shape[1] // self.d.shape[1], axis=1)
        return d * self.levels.astype(np.float32) + np.float32(0)


class Shifted(NamedTuple):
    """Blocks whose values are `d * times * u - dmin * minus`."""

    d: np.ndarray  # float32 [blocks, 1]
    dmin: np.ndarray  # float32 [blocks, 1]
    times: np.ndarray  # uint8 [blocks, scales of a block]
    minus: np.ndarray  # uint8, as `times`
    u: Levels

    def values(self) -> np.ndarray:
        """float32 [blocks, weights of a block]."""
        one, other = self.d * self.times.astype(np.float32), self.dmin * self.minus.astype(np.float32)
        wide = self.u.shape[1] // self.times.shape[1]
        return np.repeat(one, wide, axis=1) * self.u.astype(np.float32) - np.repeat(other, wide, axis=1)


class Format(NamedTuple):
    """A type of tensor in a GGUF file."""

    name: str
    number: int
    """In the file"""
    block: int
    """Weights in a block"""
    size: int
    """Bytes of a block"""
    read: Callable[[Bytes], Multiples | Shifted]
    """Blocks -> the numbers in them"""

    @property
    def bits(self) -> float:
        """Bits a weight, scales included"""
        return 8 * self.size / self.block

    def unpack(self, raw: Bytes) -> np.ndarray:
        """Blocks -> their values, float32 [blocks, weights of a block]."""
        return self.read(raw).values()


def planes(x: Levels, bits: int, lanes: int) -> Bytes:
    """Numbers [N, W] of a few bits each -> bytes [N, W * bits / 8]: `8 / bits` numbers, `lanes` apart, in a byte."""
    parts = x.astype(np.uint8).reshape(len(x), -1, 8 // bits, lanes)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(x), -1)


def from_planes(raw: Bytes, bits: int, lanes: int) -> np.ndarray:
    """The inverse of `planes`, int16."""
    parts = raw.reshape(len(raw), -1, 1, lanes)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (parts >> shifts & np.uint8(2**bits - 1)).reshape(len(raw), -1).astype(np.int16)


def trits(x: Levels, lanes: int, digits: int) -> Bytes:
    """Numbers 0, 1, 2 [N, digits * lanes] -> bytes [N, lanes]: those `lanes` apart are the digits, first to last, of a
    fraction to base 3 (with five digits, the last 0 if there are four), stored as fraction * 256 rounded up."""
    weights = 3 ** np.arange(4, 4 - digits, -1)
    number = (x.reshape(len(x), digits, lanes) * weights[:, None]).sum(axis=1)
    return (-(-number * 256 // 243)).astype(np.uint8)


def from_trits(raw: Bytes, digits: int) -> np.ndarray:
    """The inverse of `trits`, int16: times 3 to the n, what exceeds a byte is the digit n."""
    shifted = raw[:, None, :] * (3 ** np.arange(digits)).astype(np.uint8)[:, None]  # modulo 256
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.int16).reshape(len(raw), -1)


def halves(d: np.ndarray) -> Bytes:
    """Scales [N] -> their bytes as float16 [N, 2]."""
    return np.ascontiguousarray(d, "<f2").view(np.uint8).reshape(len(d), 2)


def scale(raw: Bytes, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [N, 1]."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def pack_q1_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -1, 1."""
    return np.concatenate([halves(d), planes(levels > 0, 1, 1)], axis=1)


def read_q1_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 0), 2 * from_planes(raw[:, 2:], 1, 1) - 1)


def pack_q2_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -1 to 2."""
    return np.concatenate([halves(d), planes(levels + 1, 2, 1)], axis=1)


def read_q2_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 0), from_planes(raw[:, 2:], 2, 1) - 1)


def pack_tq1_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -1 to 1: 160 weights in 32 bytes, 80 in 16, 16 in 4."""
    x = levels + 1
    return np.concatenate(
        [trits(x[:, :160], 32, 5), trits(x[:, 160:240], 16, 5), trits(x[:, 240:], 4, 4), halves(d)], 1
    )


def read_tq1_0(raw: Bytes) -> Multiples:
    parts = (from_trits(raw[:, :32], 5), from_trits(raw[:, 32:48], 5), from_trits(raw[:, 48:52], 4))
    return Multiples(scale(raw, 52), np.concatenate(parts, axis=1) - 1)


def pack_tq2_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -1 to 2."""
    return np.concatenate([planes(levels + 1, 2, 32), halves(d)], axis=1)


def read_tq2_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 64), from_planes(raw[:, :64], 2, 32) - 1)


def pack_q3_k(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -4 to 3. Each 16 weights have a scale of 6 bits, from which 32 is subtracted: here all 33, so 1."""
    u, scales = levels + 4, np.full((len(levels), 16), 33)
    low, high = planes(scales & 15, 4, 8), planes(scales >> 4, 2, 4)
    return np.concatenate([planes(u >> 2, 1, 32), planes(u & 3, 2, 32), low, high, halves(d)], axis=1)


def read_q3_k(raw: Bytes) -> Multiples:
    u = from_planes(raw[:, 32:96], 2, 32) + 4 * from_planes(raw[:, :32], 1, 32)
    scales = from_planes(raw[:, 96:104], 4, 8) + 16 * from_planes(raw[:, 104:108], 2, 4) - 32
    return Multiples(scale(raw, 108) * scales.astype(np.float32), u - 4)


def pack_q4_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -8 to 7."""
    return np.concatenate([halves(d), planes(levels + 8, 4, 16)], axis=1)


def read_q4_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 0), from_planes(raw[:, 2:], 4, 16) - 8)


def pack_q5_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -16 to 15: the fifth bits first."""
    u = levels + 16
    return np.concatenate([halves(d), planes(u >> 4, 1, 1), planes(u & 15, 4, 16)], axis=1)


def read_q5_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 0), from_planes(raw[:, 6:], 4, 16) + 16 * from_planes(raw[:, 2:6], 1, 1) - 16)


def pack_q6_k(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -32 to 31. Each 16 weights have an int8 scale: here 1."""
    u, ones = levels + 32, np.ones((len(levels), 16), np.uint8)
    return np.concatenate([planes(u & 15, 4, 64), planes(u >> 4, 2, 32), ones, halves(d)], axis=1)


def read_q6_k(raw: Bytes) -> Multiples:
    u = from_planes(raw[:, :128], 4, 64) + 16 * from_planes(raw[:, 128:192], 2, 32)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return Multiples(scale(raw, 208) * scales, u - 32)


def pack_q8_0(levels: Levels, d: np.ndarray) -> Bytes:
    """Levels -128 to 127."""
    return np.concatenate([halves(d), levels.astype(np.int8).view(np.uint8)], axis=1)


def read_q8_0(raw: Bytes) -> Multiples:
    return Multiples(scale(raw, 0), np.ascontiguousarray(raw[:, 2:]).view(np.int8))


def pack_q2_k(u: Levels, d: np.ndarray, times: int, minus: np.ndarray) -> Bytes:
    """Values `d * (times * u - minus)` of u 0 to 3; times and minus 0 to 15. Each 16 weights have their own two.

    Args:
        minus: [N].
    """
    pairs = np.repeat((times | minus << 4).astype(np.uint8)[:, None], 16, axis=1)
    return np.concatenate([pairs, planes(u, 2, 32), halves(d), halves(d)], axis=1)


def read_q2_k(raw: Bytes) -> Shifted:
    pairs, u = raw[:, :16], from_planes(raw[:, 16:80], 2, 32)
    return Shifted(scale(raw, 80), scale(raw, 82), pairs & 15, pairs >> 4, u)


def pack_q4_k(u: Levels, d: np.ndarray, times: int, minus: np.ndarray) -> Bytes:
    """Values `d * (times * u - minus)` of u 0 to 15; times and minus 0 to 63. Each 32 weights have their own two; the
    two upper bits of the last four pairs are above the six bits of the first four.

    Args:
        minus: [N].
    """
    t, m = np.full((len(u), 4), times), np.repeat(minus[:, None], 4, axis=1)
    pairs = np.concatenate([t | t >> 4 << 6, m | m >> 4 << 6, t & 15 | (m & 15) << 4], axis=1).astype(np.uint8)
    return np.concatenate([halves(d), halves(d), pairs, planes(u, 4, 32)], axis=1)


def read_q4_k(raw: Bytes) -> Shifted:
    first, second, low = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    times = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1)
    minus = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1)
    return Shifted(scale(raw, 0), scale(raw, 2), times, minus, from_planes(raw[:, 16:], 4, 32))


E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)
"""Twice the number that each 4 bits stand for"""


def e2m1(codes: Levels) -> np.ndarray:
    """Twice the numbers -> their 4 bits; zero without a sign."""
    return np.where(codes < 0, 8, 0) + np.searchsorted(E2M1[:8], np.abs(codes))


def pack_mxfp4(codes: Levels, d: np.ndarray) -> Bytes:
    """Codes: twice the numbers. d: powers of two, half the scales, of which the exponent plus 127 is stored (E8M0)."""
    exponent = np.frexp(np.asarray(d, np.float32))[1] + 127
    return np.concatenate([exponent.astype(np.uint8)[:, None], planes(e2m1(codes), 4, 16)], axis=1)


def read_mxfp4(raw: Bytes) -> Multiples:
    d = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128)
    return Multiples(np.where(raw[:, :1] == 255, np.float32(np.nan), d), E2M1[from_planes(raw[:, 1:], 4, 16)])


def pack_nvfp4(codes: Levels, d: np.ndarray) -> Bytes:
    """Codes: twice the numbers. d [4 blocks]: half the scales of each 16 numbers, which are stored as E4M3."""
    scales = (2 * d).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(-1, 4)
    return np.concatenate([scales, planes(e2m1(codes), 4, 8)], axis=1)


def read_nvfp4(raw: Bytes) -> Multiples:
    """Without the scale of the matrix, which is a tensor of its own. As llama.cpp reads them, a scale's sign is not
    looked at, and one that is no number is 0."""
    byte = raw[:, :4]
    exponent, mantissa = (byte >> 3 & 15).astype(np.int32), (byte & 7).astype(np.float32)
    scales = np.ldexp(mantissa + np.where(exponent > 0, np.float32(8), np.float32(0)), np.maximum(exponent, 1) - 10)
    scales = np.where(byte == 127, np.float32(0), scales)
    return Multiples(scales / 2, E2M1[from_planes(raw[:, 4:], 4, 8)])


Q1_0 = Format("Q1_0", 41, 128, 18, read_q1_0)
Q2_0 = Format("Q2_0", 42, 64, 18, read_q2_0)
TQ1_0 = Format("TQ1_0", 34, 256, 54, read_tq1_0)
TQ2_0 = Format("TQ2_0", 35, 256, 66, read_tq2_0)
Q2_K = Format("Q2_K", 10, 256, 84, read_q2_k)
Q3_K = Format("Q3_K", 11, 256, 110, read_q3_k)
MXFP4 = Format("MXFP4", 39, 32, 17, read_mxfp4)
Q4_0 = Format("Q4_0", 2, 32, 18, read_q4_0)
Q4_K = Format("Q4_K", 12, 256, 144, read_q4_k)
NVFP4 = Format("NVFP4", 40, 64, 36, read_nvfp4)
Q5_0 = Format("Q5_0", 6, 32, 22, read_q5_0)
Q6_K = Format("Q6_K", 14, 256, 210, read_q6_k)
Q8_0 = Format("Q8_0", 8, 32, 34, read_q8_0)
FORMATS: Mapping[int, Format] = {
    x.number: x for x in (Q1_0, Q2_0, TQ1_0, TQ2_0, Q2_K, Q3_K, MXFP4, Q4_0, Q4_K, NVFP4, Q5_0, Q6_K, Q8_0)
}
"""The types that an export packs weights into, by number. The `gguf` package (0.19) lacks Q2_0, and unpacks no Q1_0"""
NAMES: Mapping[int, str] = {kind.value: kind.name for kind in GGMLQuantizationType} | {Q2_0.number: Q2_0.name}


def sizes_of(number: int) -> tuple[int, int]:
    """(weights, bytes) of a block of the type with this number."""
    if number in FORMATS:
        return FORMATS[number].block, FORMATS[number].size
    return GGML_QUANT_SIZES[GGMLQuantizationType(number)]
