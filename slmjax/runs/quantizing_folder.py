"""What `slmjax quantize` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax import __version__
from slmjax.compress.quant.blocks import Granularity, PerChannel, PerGroup
from slmjax.compress.quant.learned import Balanced
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.compress.quant.uniform import Asymmetric, Symmetric
from slmjax.compress.quant.view import Packed, Rule, with_values
from slmjax.convert.folder import MARK, publish
from slmjax.errors import UserError
from slmjax.models.flops import parameter_count
from slmjax.runs import packed_folder
from slmjax.runs.loading import Loaded
from slmjax.runs.quantizing import bits_a_weight

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


def rules_of(grid: str, bits: int, group: int | None, embeddings: int | None) -> tuple[Rule, ...]:
    """The rules that the options of `slmjax quantize` stand for.

    Raises:
        UserError: they contradict one another.
    """
    granularity: Granularity = PerChannel() if group is None else PerGroup(size=group)
    if grid == "balanced" and bits != 2:
        raise UserError(f"--grid balanced has 2 bits, but --bits is {bits}; use --bits 2, or --grid symmetric")
    quantizer: Quantizer = {
        "symmetric": lambda: Symmetric(bits=bits, granularity=granularity),
        "asymmetric": lambda: Asymmetric(bits=bits, granularity=granularity),
        "balanced": lambda: Balanced(granularity=granularity),
    }[grid]()
    rules = (Rule(quantizer=quantizer),)
    if embeddings is None:
        return rules
    return (Rule(quantizer=Symmetric(bits=embeddings), patterns=TABLES), *rules)


def write(
    out: Path, loaded: Loaded, packed: Mapping[str, Packed], *, about: dict[str, Any], overwrite: bool
) -> Quantized:
    """Writes the model with these codes; the folder appears once it is complete.

    Raises:
        UserError: `out` may not be written.
        StorageError: the disk is full or not writable.
    """
    described = {"slmjax": __version__, "quantized": about, "imported": {"folder": loaded.source.name}}
    params = with_values(loaded.params, packed)
    with publish(out, overwrite=overwrite) as folder:
        if loaded.has_tokenizer:
            loaded.tokenizer().save(folder)
        size = packed_folder.write(folder, loaded.decoder, params, packed, described)
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
