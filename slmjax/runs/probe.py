"""How to compute on this processor: by its features, and a measurement of a second or two that is kept on disk.

The measurement is of one layer's matrix products and one layer's attention, forward and backward, in each precision
that the processor has instructions for and with each implementation that slmjax has. It is taken once for each
combination of processor, cores, jaxlib and XLA flags: the same machine then always computes in the same way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.build import cache_folder
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import Mask, Scores, reference_attention, xla_attention
from slmjax.nn.compute import Compute, einsum, for_backend, for_cpu
from slmjax.nn.einsum_cpu import cpu_einsum
from slmjax.nn.processor import Processor, processor
from slmjax.serialise import fingerprint

SWITCH = "SLMJAX_CPU_PROBE"
"""Environment variable: with `off` nothing is measured, nor read from disk; the processor's features decide"""

EINSUMS: Mapping[str, Callable] = {"cpu_einsum": cpu_einsum, "einsum": einsum}
ATTENTIONS: Mapping[str, Callable] = {
    "cpu_attention": cpu_attention,
    "reference_attention": reference_attention,
    "xla_attention": xla_attention,
}
"""The implementations that are compared, the preferred one first"""
CLEARLY = 0.95
"""Another implementation or precision than the preferred one is chosen only if it takes at most this fraction of its
time: smaller differences may be noise"""
SECONDS = 1.0
"""Seconds for which the implementations are timed in turn, after they have been compiled"""
ROUNDS = 15
"""How often each implementation runs at most"""
TOKENS, LENGTH, WIDTH, HIDDEN, HEADS = 1024, 256, 256, 704, 4
"""The layer: a micro-batch of a model of 4 million parameters"""
LAYER = ((WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
"""Its matrices"""
LAYER_FLOPS = 3 * 2 * TOKENS * sum(inner * outer for inner, outer in LAYER)
"""Of its products: results, and gradients of both factors"""

Seconds: TypeAlias = Mapping[str, Mapping[str, float]]
"""{"float32": {"cpu_einsum": seconds of a layer's products, "cpu_attention": of its attention, ...}, ...}"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The measurement, and the choice that follows from it."""

    compute: Compute
    processor: Processor
    seconds: Seconds
    """Empty: nothing was measured"""

    def lines(self) -> tuple[str, str]:
        """Two lines for the terminal: the processor; the choice, with its measurements."""
        c = self.compute
        chosen = f"fastest: {c.dtype}, {_name(c.einsum)}, {_name(c.attention)}"
        if not self.seconds:
            return str(self.processor), f"{chosen} (by the processor's features; not measured)"
        measured = "; ".join(
            f"{dtype}: " + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in forms.items())
            for dtype, forms in self.seconds.items()
        )
        return str(self.processor), f"{chosen}, of a layer's milliseconds in {measured}"


def verdict(backend: str | None = None, cache: str | Path | None = None) -> Verdict | None:
    """How to compute on this machine's CPU, as measured now or earlier; None on another backend.

    Args:
        backend: default: `jax.default_backend()`.
        cache: the folder that keeps the measurement; default $SLMJAX_CACHE, else ~/.cache/slmjax.
    """
    if (backend or jax.default_backend()) != "cpu":
        return None
    here = processor()
    if os.environ.get(SWITCH) == "off":
        return Verdict(compute=for_backend("cpu"), processor=here, seconds={})
    file = _file(cache_folder(cache), here, metadata.version("jaxlib"), os.environ.get("XLA_FLAGS", ""))
    seconds = read(file, precisions(here))
    if seconds is None:
        seconds = measure(precisions(here))
        _write(file, here, seconds)
    return Verdict(compute=choose(seconds), processor=here, seconds=seconds)


def compute_here() -> Compute:
    """The fastest known way to compute on this machine, on any backend."""
    measured = verdict()
    return for_backend(jax.default_backend()) if measured is None else measured.compute


def precisions(of: Processor) -> tuple[str, ...]:
    """The precisions worth measuring, the preferred one first. A processor without instructions for bfloat16 converts
    it to float32 and back, which gains nothing. Where the features are not known, both are measured."""
    return ("bfloat16", "float32") if of.bfloat16 or not of.features else ("float32",)


def choose(seconds: Seconds, dtype: str | None = None) -> Compute:
    """The fastest implementation of each part in the fastest precision, or in `dtype`, by the measurements.

    If nothing was measured in `dtype`: the preferred implementations.
    """
    if dtype is not None and dtype not in seconds:
        return for_cpu(dtype)
    best = {d: (_fastest(forms, EINSUMS), _fastest(forms, ATTENTIONS)) for d, forms in seconds.items()}
    total = {d: sum(seconds[d][name] for name in pair) for d, pair in best.items()}
    dtype = dtype or _preferred(total)
    products, attention = best[dtype]
    return for_cpu(dtype, einsum=EINSUMS[products], attention=ATTENTIONS[attention])


def _fastest(forms: Mapping[str, float], among: Mapping[str, Any]) -> str:
    return _preferred({name: forms[name] for name in among})


def _preferred(seconds: Mapping[str, float]) -> str:
    """The first, unless another is clearly faster."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= CLEARLY * seconds[first] else first


def _file(folder: Path, here: Processor, jaxlib: str, xla_flags: str) -> Path:
    key = fingerprint({"form": 1, "processor": _json(here), "jaxlib": jaxlib, "xla_flags": xla_flags.split()})
    return folder / "cpu" / f"{key[:16]}.json"


def read(file: Path, dtypes: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """The measurement that a file holds; None if there is none, or the file is damaged or of another version."""
    try:
        seconds = json.loads(file.read_text())["seconds"]
        measured = {d: {name: float(seconds[d][name]) for name in (*EINSUMS, *ATTENTIONS)} for d in dtypes}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    good = all(math.isfinite(x) and x > 0 for forms in measured.values() for x in forms.values())
    return measured if good else None


def _write(file: Path, here: Processor, seconds: Seconds) -> None:
    """Atomically; a cache that cannot be written costs the next start a measurement, nothing else."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"processor": _json(here), "seconds": seconds}, indent=1) + "\n")
        part.replace(file)


def _json(of: Processor) -> dict[str, Any]:
    return {**asdict(of), "features": list(of.features)}


def _name(form: Callable) -> str:
    return getattr(form, "__name__", str(form))


def measure(dtypes: Sequence[str], seconds: float = SECONDS, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Compiles every implementation and times them in turn, so that other load on the machine affects all alike."""
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for dtype in dtypes:
        for parts, layer in ((EINSUMS, layer_products), (ATTENTIONS, _attention)):
            for name, form in parts.items():
                f, args = layer(form, dtype)
                runs[dtype, name] = jax.jit(f).lower(*args).compile()
                jax.block_until_ready(runs[dtype, name](*args))
                runs[dtype, name] = _with_args(runs[dtype, name], args)
    clocks = (time.perf_counter, time.process_time)
    best = {clock: dict.fromkeys(runs, math.inf) for clock in clocks}
    end = time.monotonic() + seconds
    for _ in range(rounds):
        for key, run in runs.items():
            start = [clock() for clock in clocks]
            jax.block_until_ready(run())
            for clock, at in zip(clocks, start, strict=True):
                best[clock][key] = min(best[clock][key], clock() - at)
        if time.monotonic() > end:
            break
    return {d: {name: s for (of, name), s in undisturbed(*best.values()).items() if of == d} for d in dtypes}


def undisturbed(elapsed: dict[Any, float], work: dict[Any, float]) -> dict[Any, float]:
    """Elapsed seconds; or, if other programs kept the cores busy, CPU seconds summed over the cores, which do not
    include waiting for a core."""
    return elapsed if all(elapsed[key] <= 1.1 * work[key] for key in elapsed) else work


def _with_args(f: Callable, args: tuple) -> Callable[[], Any]:
    return lambda: f(*args)


def layer_products(form: Callable, dtype: str) -> tuple[Callable, tuple]:
    """Results and gradients of the products with a layer's matrices, one of each shape."""
    shapes = LAYER
    inputs = [_random(i, (1, TOKENS, n), dtype) for i, (n, _) in enumerate(shapes)]
    weights = [_random(i, shape, dtype) for i, shape in enumerate(shapes)]
    cotangents = [_random(i + 1, (1, TOKENS, n), dtype) for i, (_, n) in enumerate(shapes)]

    def f(xs, ws, gs):
        each = zip(xs, ws, gs, strict=True)
        return [_with_gradient(lambda x, w: form("btd,dh->bth", x, w), g, x, w) for x, w, g in each]

    return f, (inputs, weights, cotangents)


def _attention(form: Callable, dtype: str) -> tuple[Callable, tuple]:
    """Result and gradients of a layer's attention over documents."""
    b = TOKENS // LENGTH
    q, k, v, g = (_random(i, (b, LENGTH, HEADS, WIDTH // HEADS), dtype) for i in range(4))
    segments = jnp.broadcast_to(1 + jnp.arange(LENGTH, dtype=jnp.int32) // 150, (b, LENGTH))
    rule = Scores(scale=(WIDTH // HEADS) ** -0.5)

    def f(q, k, v, g, segments):
        return _with_gradient(lambda q, k, v: form(q, k, v, Mask.of_rows(segments), rule), g, q, k, v)

    return f, (q, k, v, g, segments)


def _with_gradient(f: Callable, g: jax.Array, *args: jax.Array) -> Any:
    y, pull = jax.vjp(f, *args)
    return y, pull(g)


def _random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))
