"""The processor: its name, its instructions for matrix products, the number of cores that this process may use.

Imports no jax.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""Features with instructions that multiply bfloat16 numbers; without any of them XLA converts to float32 first"""
RELEVANT = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "asimd", "sve", "sve2", *BFLOAT16)
"""Features for matrix products, named as in /proc/cpuinfo. asimd, sve, sve2, bf16 and svebf16 are Arm's"""

LEVELS = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX", "AMX_FP16")
"""Values of XLA's flag `--xla_cpu_max_isa`, lowest first"""
NEEDS = {  # feature -> the lowest of LEVELS that includes it
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX",
}


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The properties of a processor that decide how fast its matrix products can be."""

    name: str
    features: tuple[str, ...]
    """Those of `RELEVANT` that it has, in that order"""
    cores: int
    """Number of cores that this process may use"""

    @property
    def bfloat16(self) -> bool:
        """Whether it has instructions for products of bfloat16."""
        return any(name in BFLOAT16 for name in self.features)

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        return f"{self.name}, {cores} ({', '.join(self.features) or 'features unknown'})"


def processor(xla_flags: str | None = None) -> Processor:
    """This machine's processor, without the features that `--xla_cpu_max_isa` in `xla_flags` (default: $XLA_FLAGS)
    forbids."""
    name, flags = _described()
    given = os.environ.get("XLA_FLAGS", "") if xla_flags is None else xla_flags
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(name=name, features=allowed(relevant(flags), given), cores=cores)


def relevant(flags: Iterable[str]) -> tuple[str, ...]:
    """Those of `RELEVANT` that are among the flags."""
    present = set(flags)
    return tuple(name for name in RELEVANT if name in present)


def allowed(features: tuple[str, ...], xla_flags: str) -> tuple[str, ...]:
    """The features at or below `--xla_cpu_max_isa`; all of them without that flag, or with a value not in `LEVELS`."""
    values = re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags)
    if not values or values[-1].upper() not in LEVELS:
        return features
    most = LEVELS.index(values[-1].upper())
    return tuple(name for name in features if name not in NEEDS or LEVELS.index(NEEDS[name]) <= most)


def from_cpuinfo(text: str) -> tuple[str, list[str]]:
    """(name, flags) of the first processor in Linux's /proc/cpuinfo; empty if they are not listed."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("cpu model") or ""
    return name, (fields.get("flags") or fields.get("features") or "").split()


def from_sysctl(text: str) -> tuple[str, list[str]]:
    """(name, flags), named as Linux names them, from the output of macOS' `sysctl -a` or a part of it."""
    fields = dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))
    words = " ".join(fields.get(f"machdep.cpu.{key}", "") for key in ("features", "leaf7_features")).lower()
    flags = words.replace("avx1.0", "avx").split()
    arm = {"hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.AdvSIMD": "asimd", "hw.optional.neon": "asimd"}
    return fields.get("machdep.cpu.brand_string", ""), [*flags, *(v for k, v in arm.items() if fields.get(k) == "1")]


def _described() -> tuple[str, list[str]]:
    name, flags = "", []
    try:
        if sys.platform == "darwin":
            done = subprocess.run(
                ["sysctl", "machdep.cpu", "hw.optional"], capture_output=True, text=True, timeout=10, check=False
            )
            name, flags = from_sysctl(done.stdout)
        else:
            name, flags = from_cpuinfo(Path("/proc/cpuinfo").read_text())
    except (OSError, subprocess.SubprocessError):
        pass  # another system: its features are unknown, and measurements decide
    return name or platform.processor() or platform.machine(), flags
