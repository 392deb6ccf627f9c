"""What `slmjax quantize` writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax import __version__
from slmjax.compress.quant.blocks import Granularity, PerChannel, PerGroup
from slmjax.compress.quant.float4 import MXFP4, NVFP4
from slmjax.compress.quant.learned import Balanced
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import Asymmetric, Symmetric
from slmjax.compress.quant.view import Rule
from slmjax.convert.folder import MARK, publish
from slmjax.errors import UserError
from slmjax.models.flops import parameter_count
from slmjax.runs import packed_folder
from slmjax.runs.loading import Loaded
from slmjax.runs.quantizing import Rounded, bits_a_weight

TABLES = ("*embed/table",)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized model on disk."""

    parameters: int
    weights: int
    """Parameters that are rounded"""
    bits: float
    """Bits of each of these, with scales"""
    bytes: int
    """Of all weights on disk"""
    tokens_a_parameter: float | None
    """Training tokens for each parameter; None for a model that slmjax has not trained. The damage of rounding grows
    with it: Kumar et al. 2024, arXiv:2411.04330"""


def rules_of(grid: str, bits: int, group: int | None, embeddings: int | None, method: str = "rtn") -> tuple[Rule, ...]:
    """The rules that the options of `slmjax quantize` stand for. Methods that search for scales get those of MXFP4 that
    clip no weight: they may choose any smaller power of two.

    Raises:
        UserError: one is out of range, or they contradict one another.
    """
    for option, given in (("--bits", bits), ("--embeddings", embeddings)):
        if given is not None and not 2 <= given <= 8:
            raise UserError(f"{option} is {given}; expected 2 to 8")
    if group is not None and group < 1:
        raise UserError(f"--group is {group}; expected at least 1, such as 128")
    granularity: Granularity = PerChannel() if group is None else PerGroup(size=group)
    if grid == "balanced" and bits != 2:
        raise UserError(f"--grid balanced has 2 bits, but --bits is {bits}; use --bits 2, or --grid symmetric")
    if grid in ("mxfp4", "nvfp4") and (bits != 4 or group is not None):
        wrong = f"--bits is {bits}" if bits != 4 else f"--group is {group}"
        raise UserError(f"--grid {grid} has 4 bits and groups of its own, but {wrong}; leave that out")
    quantizer: Quantizer = {
        "symmetric": lambda: Symmetric(bits=bits, granularity=granularity),
        "asymmetric": lambda: Asymmetric(bits=bits, granularity=granularity),
        "balanced": lambda: Balanced(granularity=granularity),
        "mxfp4": lambda: MXFP4(exponent="floor" if method == "rtn" else "ceil"),
        "nvfp4": NVFP4,
    }[grid]()
    rules = (Rule(quantizer=quantizer),)
    if embeddings is None:
        return rules
    return (Rule(quantizer=Symmetric(bits=embeddings), patterns=TABLES), *rules)


def write(out: Path, loaded: Loaded, rounded: Rounded, *, about: dict[str, Any], overwrite: bool) -> Quantized:
    """Writes the rounded model; the folder appears once it is complete.

    Raises:
        UserError: `out` may not be written.
        StorageError: the disk is full or not writable.
    """
    described = {"slmjax": __version__, "quantized": about, "imported": {"folder": loaded.source.name}}
    packed = rounded.packed
    with publish(out, overwrite=overwrite) as folder:
        loaded.save_texts(folder)
        size = packed_folder.write(folder, loaded.decoder, rounded.params, packed, described)
        (folder / MARK).write_text(json.dumps({"slmjax": __version__, "quantized": about}, indent=2) + "\n", "utf-8")
    parameters = parameter_count(loaded.decoder)
    return Quantized(
        parameters=parameters,
        weights=sum(math.prod(p.blocks.shape) for p in packed.values()),
        bits=bits_a_weight(packed),
        bytes=size,
        tokens_a_parameter=_tokens(loaded, parameters),
    )


def _tokens(loaded: Loaded, parameters: int) -> float | None:
    if loaded.experiment is None or loaded.step is None:
        return None
    data = loaded.experiment.data
    return loaded.step * data.batch * data.length / parameters
