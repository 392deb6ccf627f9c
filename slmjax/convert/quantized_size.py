"""How many bytes the quantized weights of a folder take, and how many they should."""

from __future__ import annotations

import math
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slmjax.convert.gate import Check
from slmjax.convert.pack_quantized import METHOD, Stored
from slmjax.convert.safetensors_io import READ, Described, Tensors


class Kind(NamedTuple):
    """The quantized matrices that are stored alike."""

    name: str
    format: str
    """Of compressed-tensors"""
    matrices: int
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight, scales and shapes included"""
        return 8 * self.bytes / self.weights


class Sizes(NamedTuple):
    """Bytes of tensors in a folder."""

    kinds: tuple[Kind, ...]
    """Expected, by the formula of the format"""
    found: int
    """Of the quantized matrices in the files"""
    total: int
    """Of all tensors: embeddings, head and norms too"""

    @property
    def expected(self) -> int:
        return sum(kind.bytes for kind in self.kinds)

    def check(self) -> Check:
        """Whether the files hold what the formula says, to the byte."""
        weights = sum(kind.weights for kind in self.kinds)
        found = f"{self.found} bytes, {8 * self.found / weights:.4g} bits a weight; all tensors {self.total} bytes"
        return Check(
            name="size: quantized weights",
            found=found,
            expected=f"{self.expected} bytes",
            passed=self.found == self.expected,
        )

    def json(self) -> dict[str, Any]:
        """For slmjax_export.json."""
        kinds = [
            {"carrier": k.name, "matrices": k.matrices, "weights": k.weights, "bytes": k.bytes, "bits_a_weight": k.bits}
            for k in self.kinds
        ]
        format = f"{METHOD} {', '.join(dict.fromkeys(k.format for k in self.kinds))}"
        return {"format": format, "kinds": kinds, "bytes": self.found, "bytes_of_all_tensors": self.total}

    def lines(self) -> tuple[str, ...]:
        """For the model card."""
        each = [
            f"{k.matrices} matrices as {k.name}: {k.bits:.3g} bits a weight ({METHOD} {k.format})" for k in self.kinds
        ]
        return *each, f"all tensors, embeddings and norms included: {self.total:,} bytes"


def measure(folder: pathlib.Path, stored: Mapping[str, Stored], dtype: str) -> Sizes:
    """Sizes of a folder whose quantized modules are `stored`."""
    described = Tensors(folder).described
    matrices, weights, sizes = Counter[str](), Counter[str](), Counter[str]()
    formats: dict[str, str] = {}
    for how, shape in stored.values():
        name = str(how)
        formats[name] = how.format
        matrices[name] += 1
        weights[name] += math.prod(shape)
        sizes[name] += how.bytes(shape, dtype)
    keys = (f"{module}.{last}" for module, how in stored.items() for last in how.carrier.parts)
    return Sizes(
        tuple(Kind(name, formats[name], matrices[name], weights[name], sizes[name]) for name in matrices),
        sum(_bytes(described[key]) for key in keys),
        sum(map(_bytes, described.values())),
    )


def _bytes(tensor: Described) -> int:
    return math.prod(tensor.shape) * np.dtype(READ[tensor.dtype]).itemsize
