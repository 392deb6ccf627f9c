"""The checks of an export: what was written is read back and compared with the model in memory.

`gate_stock` checks it with stock transformers, `gguf/gate.py` with llama.cpp.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from slmjax.convert import memory
from slmjax.convert.folder import Rejected
from slmjax.convert.hf import Imported
from slmjax.errors import UserError
from slmjax.files import at
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.nn.initial import Normal
from slmjax.nn.numerics import Numerics
from slmjax.tree import flatten
from slmjax.types import Model, Params

TOLERANCE = 1e-5
"""Largest allowed difference, relative to max(1, max|x|). Two float32 programs of the same function differ by at most
2e-6 on small models."""
PLAIN = Numerics()
ENVIRONMENT = "SLMJAX_REFERENCE_PYTHON"


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check: a line of the table that an export prints."""

    name: str
    found: str
    expected: str
    passed: bool | None
    """None: the check could not be run here, or is for information only"""

    def json(self) -> dict[str, Any]:
        """For slmjax_export.json."""
        return asdict(self)


class Forward(NamedTuple):
    """Outputs of a model for tokens [B, T], as numpy."""

    logits: np.ndarray  # [B, T, V]; [B, 1, V] where the head reads one token a row
    stages: tuple[np.ndarray, ...]  # L + 1 of [B, T, D]: the input of each block, then of the unembedding


class Probe(NamedTuple):
    """Sequences on which models are compared. Rows may be padded."""

    tokens: np.ndarray  # int32 [B, T]
    mask: np.ndarray  # int32 [B, T]: 0 at padding

    @property
    def positions(self) -> np.ndarray:
        """[B, T]: counts the tokens that are not padding."""
        return np.maximum(np.cumsum(self.mask, axis=1) - 1, 0).astype(np.int32)


def make_probe(tokens: np.ndarray, context: int, length: int = 64, pads: str = "left", pad: int | None = None) -> Probe:
    """The first `length` int tokens of rows [B, T'], a third of the second row turned into padding on the side `pads`.

    Args:
        pad: the id put at padding; None leaves the tokens there, which must not change any output.
    """
    tokens = np.array(tokens[:, : min(length, context)], dtype=np.int32, order="C")
    mask = np.ones_like(tokens)
    if len(tokens) > 1:
        third = tokens.shape[1] // 3
        mask[1, slice(third) if pads == "left" else slice(tokens.shape[1] - third, None)] = 0
        if pad is not None:
            tokens[mask == 0] = pad
    return Probe(tokens, mask)


def forward(decoder: Assembly, params: Params, probe: Probe, numerics: Numerics = PLAIN) -> Forward:
    """Logits and the input of each stage, in float32 but for what `numerics` rounds."""
    run = _program(
        replace(decoder, initial=Normal()), numerics
    )  # initial values do not matter: one program, compiled once
    with jax.default_matmul_precision("highest"):  # a GPU would use TF32 instead of float32
        logits, blocks, hidden = run(params, probe.tokens, probe.positions, probe.mask)
    # The input of the unembedding may be of another width than the blocks' (OPT-350m).
    return Forward(np.asarray(logits), (*np.asarray(blocks), np.asarray(hidden)))


@functools.lru_cache(maxsize=1)
def _program(decoder: Assembly, numerics: Numerics) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    model = decoder.build(Compute(dtype="float32"), numerics)

    @jax.jit
    def run(params: Any, tokens: Any, positions: Any, segments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        out = model.apply(params, tokens, positions, segments, collect=True)
        return model.unembed(params, out.hidden), out.blocks[:-1], out.hidden

    return run


def greedy(model: Model, params: Params, prompts: Probe, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The most likely continuation of prompts [P, T], padded on the left, with a key-value cache.

    Returns:
        int32 [P, N] tokens, and float32 [P, N]: the difference between the largest logit and the second largest.
    """

    @jax.jit
    def run(params: Any, cache: Any, tokens: Any, positions: Any, segments: Any) -> tuple[Any, jax.Array, jax.Array]:
        out = model.apply(params, tokens, positions, segments, cache=cache)
        best, index = jax.lax.top_k(model.unembed(params, out.hidden[:, -1]), 2)
        return out.cache, index[:, :1].astype(jnp.int32), best[:, 0] - best[:, 1]

    rows, length = prompts.tokens.shape
    cache = model.init_cache(rows, length + new_tokens)
    lengths = prompts.mask.sum(axis=1, keepdims=True, dtype=np.int32)
    tokens, positions, segments = prompts.tokens, prompts.positions, prompts.mask
    found, margins = [], []
    with jax.default_matmul_precision("highest"):
        for i in range(new_tokens):
            cache, tokens, margin = run(params, cache, tokens, positions, segments)
            positions, segments = lengths + i, np.ones_like(lengths)
            found.append(np.asarray(tokens[:, 0]))
            margins.append(np.asarray(margin))
    return np.stack(found, axis=1), np.stack(margins, axis=1)


def compare(name: str, ours: Forward, other: Forward, probe: Probe) -> Check:
    """Checks that logits agree within the tolerance except at padding; if not, names the first stage that differs."""
    real = probe.mask.astype(bool)
    compared = real[:, : ours.logits.shape[1]]
    error, most = _distance(ours.logits[compared], other.logits[compared])
    found = f"max|Δ| {error:.1e}"
    if not error <= most:
        found += f", {first_drift(ours, other, probe)}"
    return Check(name=name, found=found, expected=f"≤ {most:.1e}", passed=bool(error <= most))


def first_drift(ours: Forward, other: Forward, probe: Probe) -> str:
    """Names the first stage at which two models differ, as text."""
    real = probe.mask.astype(bool)
    last = len(ours.stages) - 1
    for i, (a, b) in enumerate(zip(ours.stages, other.stages, strict=True)):
        error, most = _distance(a[real], b[real])
        if not error <= most:
            place = "embedding" if i == 0 else f"block {i - 1}" if i < last else f"block {i - 1} or the final norm"
            return f"drifts first in the {place} (max|Δ| {error:.1e})"
    return "drifts only in the unembedding"


class Before(NamedTuple):
    """What is kept of a model, to compare with, while its export is read back."""

    dtype: str
    hashes: dict[str, str]
    """Parameter path -> hash of its bytes, after rounding to `dtype`"""
    forward: Forward


def check_fold(model: tuple[Assembly, Params], folded: tuple[Assembly, Params], probe: Probe) -> Check:
    """Compares logits before and after scalars are folded into the weights; inner activations differ by design."""
    real = probe.mask.astype(bool)
    ours, theirs = (forward(decoder, params, probe).logits[real] for decoder, params in (model, folded))
    error, most = _distance(ours, theirs)
    return Check(
        name="fold: logits of the folded and the unfolded model",
        found=f"max|Δ| {error:.1e}",
        expected=f"≤ {most:.1e}",
        passed=bool(error <= most),
    )


def remember(
    decoder: Assembly,
    params: Params,
    dtype: str,
    probe: Probe,
    *,
    donate: bool = False,
    packed: Collection[str] = (),
) -> Before:
    """Hashes and outputs of a model. `donate`: delete the parameters afterwards. `packed`: paths of quantized
    parameters, which are not rounded to the dtype."""
    held = memory.rounded(params, dtype, donate=donate, keep=packed)
    hashes = {path: xxhash.xxh3_128_hexdigest(memory.bits(x)) for path, x in flatten(held).items()}
    out = Before(dtype, hashes, forward(decoder, held, probe))
    if donate:
        memory.delete(held)
    elif held is not params:  # those in `packed` are the caller's
        memory.delete([x for path, x in flatten(held).items() if path not in packed])
    return out


def check_reload(before: Before, imported: Imported, probe: Probe) -> list[Check]:
    """Compares the folder read back with the model that was in memory."""
    found = {path: xxhash.xxh3_128_hexdigest(memory.bits(x)) for path, x in flatten(imported.params).items()}
    differ = [path for path, value in before.hashes.items() if found.get(path) != value]
    summary = f"{len(differ)} differ, first {differ[0]}" if differ else f"all {len(before.hashes)} identical"
    name = f"reload: parameters ({before.dtype})"
    same = Check(name=name, found=summary, expected="identical", passed=not differ)
    theirs = forward(imported.decoder, imported.params, probe)
    return [same, compare("reload: logits", before.forward, theirs, probe)]


def find_python(given: str | None, *needs: str) -> str | None:
    """The Python with the reference libraries: `given`, else $SLMJAX_REFERENCE_PYTHON, else this one if it has them.

    Args:
        needs: modules that this Python must have; by default torch and transformers.

    Raises:
        UserError: `given` cannot be run.
    """
    if named := given or os.environ.get(ENVIRONMENT):
        path = str(at(named))
        if not os.access(path, os.X_OK):
            raise UserError(f"--reference-python {path} cannot be run; expected a Python with torch and transformers")
        return path
    have = all(_installed(name) for name in needs or ("torch", "transformers"))
    return sys.executable if have else None


def demand(checks: list[Check]) -> None:
    """Raises Rejected naming the first check that failed."""
    for check in checks:
        if check.passed is False:
            raise Rejected(f"the export failed its check: {check.name}: {check.found}; expected {check.expected}")


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """max|a - b| (NaN if either has one), and the largest allowed value of it."""
    return float(np.abs(a - b).max()), limit(a)


def limit(x: np.ndarray) -> float:
    return TOLERANCE * max(1.0, float(np.abs(x).max()))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError):  # blocked in sys.modules, or by a finder
        return False
