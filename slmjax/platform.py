"""Settings that must be made before jax is imported: XLA's flags, the compilation cache.

Everything here is a default that the user's environment overrides. Imports no jax.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib import metadata

SWITCH = "SLMJAX_XLA_FLAGS"
"""Environment variable: `off` sets nothing but the compilation cache; `onednn` adds the flags of `ONEDNN`"""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One of XLA's flags, with the jaxlib versions that accept it: XLA ends the process at a flag it does not know."""

    name: str
    value: str
    since: tuple[int, ...]
    until: tuple[int, ...]
    """The first version in which the flag has not been tried"""

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


FLAGS: tuple[Flag, ...] = (
    # Schedules for memory instead of for concurrency: a third less of temporaries in a training step, no slower.
    Flag(name="xla_cpu_enable_concurrency_optimized_scheduler", value="false", since=(0, 10), until=(0, 13)),
)

ONEDNN: tuple[Flag, ...] = (
    # Not the default: no faster than `nn.einsum_cpu`, jaxlib 0.12.0 may abort when a compiled program is freed just
    # after it ran (object_pool.h: "Check failed"), and no such program reaches the compilation cache.
    Flag(name="xla_cpu_use_onednn", value="true", since=(0, 12), until=(0, 13)),
    Flag(name="xla_cpu_experimental_onednn_fusion_type", value="dot", since=(0, 12), until=(0, 13)),
)

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=3145728:glibc.malloc.arena_max=1"
"""Settings of glibc's memory allocator for XLA on a CPU. See docs/performance.md.

hugetlb: transparent huge pages. XLA allocates all temporaries at the start of a step and frees them at its end, so that
each step faults its pages in again: with pages of 4 KiB that takes a fifth of a step. mmap_threshold (bytes) and
arena_max: memory that matrix products free goes back to the system, or to the one arena, instead of staying unused in
several arenas.
"""


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the compilation cache and XLA's flags, unless the user has set them. Call before jax is imported."""
    environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/slmjax/jax"))
    switch = environ.get(SWITCH, "")
    if switch != "off":
        flags = FLAGS + (ONEDNN if switch == "onednn" else ())
        environ["XLA_FLAGS"] = xla_flags(environ.get("XLA_FLAGS", ""), jaxlib_version(), flags)


def tune_malloc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Starts this process again (same id, same arguments) with `MALLOC`, which glibc reads at start only.

    Does nothing on other systems than Linux, if the user has set GLIBC_TUNABLES, or if SLMJAX_XLA_FLAGS is `off`.
    """
    if sys.platform.startswith("linux") and environ.get(SWITCH) != "off" and "GLIBC_TUNABLES" not in environ:
        sys.stdout.flush()
        environ["GLIBC_TUNABLES"] = MALLOC
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def give_back() -> None:
    """Returns memory that malloc holds but nobody uses to the system: glibc keeps what compilation has freed."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


def xla_flags(given: str, version: tuple[int, ...], flags: tuple[Flag, ...]) -> str:
    """Those of `flags` that this jaxlib version accepts and the user has not set, followed by the user's own."""
    set_by_user = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    added = [str(f) for f in flags if f.since <= version < f.until and f.name not in set_by_user]
    return " ".join([*added, *given.split()])


def jaxlib_version() -> tuple[int, ...]:
    """(major, minor) of the installed jaxlib."""
    return tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])


def configure_import(environ: MutableMapping[str, str] = os.environ) -> None:
    """`configure` for `import slmjax`: prints a warning if jax was imported first and may not read the flags."""
    before = environ.get("XLA_FLAGS", "")
    configure(environ)
    if "jax" in sys.modules and environ.get("XLA_FLAGS", "") != before:
        print("slmjax: jax was imported first and may miss the flags that make it fast here; import slmjax before jax",
              file=sys.stderr)  # fmt: skip
