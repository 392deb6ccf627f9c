"""What has to be set before jax is imported: XLA's flags, the compilation cache.

Everything here is a default that the user's environment overrides, and stays jax-free until `probe_bf16`.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib import metadata

SWITCH = "SLMJAX_XLA_FLAGS"
"""Environment variable: `onednn` adds the flags below; `off`, or unset, leaves XLA's flags as they are"""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One of XLA's flags, with the jaxlib versions in which it is known: an unknown one ends the process."""

    name: str
    value: str
    since: tuple[int, ...]
    until: tuple[int, ...]
    """The first version, after those it was tried in, for which nothing is known"""

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


ONEDNN: tuple[Flag, ...] = (
    # Not the default: about a tenth faster, but jaxlib 0.12.0 may abort when a compiled program is freed just after it
    # ran (object_pool.h: "Check failed"), and no such program reaches the compilation cache. See docs/performance.md.
    Flag(name="xla_cpu_use_onednn", value="true", since=(0, 12), until=(0, 13)),
    Flag(name="xla_cpu_experimental_onednn_fusion_type", value="dot", since=(0, 12), until=(0, 13)),
)


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what this platform needs, unless the user has set it: call before jax is imported."""
    environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/slmjax/jax"))
    flags = {"onednn": ONEDNN}.get(environ.get(SWITCH, ""), ())
    if flags:
        environ["XLA_FLAGS"] = xla_flags(environ.get("XLA_FLAGS", ""), _jaxlib(), flags)


def xla_flags(given: str, version: tuple[int, ...], flags: tuple[Flag, ...]) -> str:
    """The user's flags, after those of ours that `version` of jaxlib knows and the user has not set."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [str(f) for f in flags if f.since <= version < f.until and f.name not in named]
    return " ".join([*ours, *given.split()])


def _jaxlib() -> tuple[int, ...]:
    """(major, minor) of the installed jaxlib."""
    return tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])


def probe_bf16(size: int = 512, repeats: int = 5) -> str | None:
    """A warning if the gradient of a bfloat16 product is no faster here than in float32, else None.

    Imports jax and compiles two small products: about 0.2 s.
    """
    import jax
    import jax.numpy as jnp

    from slmjax.nn.einsum_cpu import transpose

    def seconds(dtype) -> float:
        x, g = jnp.ones((4 * size, size), dtype), jnp.ones((4 * size, size), dtype)
        dot = jax.jit(lambda x, g: transpose(x) @ g).lower(x, g).compile()
        dot(x, g).block_until_ready()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            dot(x, g).block_until_ready()
            found.append(time.perf_counter() - start)
        return min(found)

    ratio = seconds(jnp.float32) / seconds(jnp.bfloat16)
    if ratio > 1.2:
        return None
    return (
        f"bfloat16 weight gradients run at {ratio:.2f}x the speed of float32: no fast path in this CPU or jaxlib; "
        "try --runtime.compute.dtype float32 (docs/performance.md)"
    )
