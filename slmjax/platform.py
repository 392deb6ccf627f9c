"""What has to be set before jax is imported: XLA's flags, the compilation cache.

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
"""Environment variable: `off` leaves everything as it is, but for the compilation cache; `onednn` adds more flags"""


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


FLAGS: tuple[Flag, ...] = (
    # Schedules for memory instead of for concurrency: a third less of temporaries in a training step, no slower.
    Flag(name="xla_cpu_enable_concurrency_optimized_scheduler", value="false", since=(0, 10), until=(0, 13)),
)

ONEDNN: tuple[Flag, ...] = (
    # Not the default: no faster than our own products, jaxlib 0.12.0 may abort when a compiled program is freed just
    # after it ran (object_pool.h: "Check failed"), and no such program reaches the compilation cache.
    Flag(name="xla_cpu_use_onednn", value="true", since=(0, 12), until=(0, 13)),
    Flag(name="xla_cpu_experimental_onednn_fusion_type", value="dot", since=(0, 12), until=(0, 13)),
)

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=3145728:glibc.malloc.arena_max=1"
"""How glibc is to serve XLA on a CPU. See docs/performance.md.

hugetlb: transparent huge pages. XLA allocates all temporaries at the start of a step and frees them at its end, so that
each step faults its pages in anew: by 4 KiB that takes a fifth of a step. mmap_threshold (bytes) and arena_max: what
matrix products allocate and free goes back to the system, or to the one arena, instead of piling up in several.
"""


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what this platform needs, unless the user has set it: call before jax is imported."""
    environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/slmjax/jax"))
    switch = environ.get(SWITCH, "")
    if switch != "off":
        flags = FLAGS + (ONEDNN if switch == "onednn" else ())
        environ["XLA_FLAGS"] = xla_flags(environ.get("XLA_FLAGS", ""), jaxlib_version(), flags)


def tune_malloc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Starts this process again (same id, same arguments) with `MALLOC`, which glibc reads at start only.

    Does nothing off Linux, where the user has tuned malloc, or where our settings are off.
    """
    if sys.platform.startswith("linux") and environ.get(SWITCH) != "off" and "GLIBC_TUNABLES" not in environ:
        sys.stdout.flush()
        environ["GLIBC_TUNABLES"] = MALLOC
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def give_back() -> None:
    """Memory that is free but still held by malloc goes back to the system: glibc keeps what a compiler has used."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


def xla_flags(given: str, version: tuple[int, ...], flags: tuple[Flag, ...]) -> str:
    """The user's flags, after those of ours that `version` of jaxlib knows and the user has not set."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [str(f) for f in flags if f.since <= version < f.until and f.name not in named]
    return " ".join([*ours, *given.split()])


def jaxlib_version() -> tuple[int, ...]:
    """(major, minor) of the installed jaxlib."""
    return tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])


def configure_import(environ: MutableMapping[str, str] = os.environ) -> None:
    """`configure`, as `import slmjax` does it: says in one line if jax was there first and will not see the flags."""
    before = environ.get("XLA_FLAGS", "")
    configure(environ)
    if "jax" in sys.modules and environ.get("XLA_FLAGS", "") != before:
        print("slmjax: jax was imported first and may miss the flags that make it fast here; import slmjax before jax",
              file=sys.stderr)  # fmt: skip
