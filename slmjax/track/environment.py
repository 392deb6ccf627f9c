"""What produced a run: versions, machine, git commit and diff, command line. Secrets are taken out.

Environment variables are never recorded: they may hold keys.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"
MAX_DIFF = 4_000_000
"""Characters"""

_SECRET_NAME = (
    r"(?:api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|private[_-]?key|pass(?:word|wd|phrase)|credentials?|token)"
)
_NAMED = re.compile(  # WANDB_API_KEY=..., "api_key": "...", --hub-token=...; a value has a digit, unlike most code
    rf"(?i)(\b[\w-]*{_SECRET_NAME}[\"']?\s*[=:]\s*[\"']?)(?=[^\s\"']*\d)([\w\-./+=~]{{8,}})"
)
_PASSWORD = re.compile(r"(?i)(\b[\w-]*pass(?:word|wd|phrase)[\"']?\s*[=:]\s*[\"'])([^\"'\n]+)")
_FLAG = re.compile(rf"(?i)^--?[\w.-]*{_SECRET_NAME}$")
_KNOWN = re.compile(
    r"""(?x)
    \bhf_[A-Za-z0-9]{16,}                                   # Hugging Face
    | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}                     # OpenAI, Anthropic and alike
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                         # AWS key id
    | \b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \bwandb_v\d_\w{20,}
    | \bAIza[\w-]{30,}                                      # Google
    | \bxox[abprs]-[\w-]{10,}                               # Slack
    | \beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}               # JSON web token
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----[\s\S]*?-----END[ A-Z]*PRIVATE\ KEY-----
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                       # https://user:password@host
    | (?<=[Bb]earer\ )[\w\-.~+/=]{8,}
    """
)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without what looks like a key, token or password, or is the value of a variable named like one."""
    for value in _secret_values(environ):
        text = text.replace(value, REDACTED)
    text = _KNOWN.sub(REDACTED, text)
    text = _PASSWORD.sub(rf"\1{REDACTED}", text)
    return _NAMED.sub(rf"\1{REDACTED}", text)


def redact_argv(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A command line without secrets; `--api-key VALUE` in two words too."""
    flags = [False, *(bool(_FLAG.match(word)) for word in argv)]
    return [REDACTED if secret else redact(word, environ) for secret, word in zip(flags, argv, strict=False)]


def redact_json(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """JSON with every string redacted, and what has a secret's name."""
    if isinstance(value, Mapping):
        return {
            k: REDACTED if isinstance(v, str) and v and _FLAG.match(f"--{k}") else redact_json(v, environ)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_json(v, environ) for v in value]
    return redact(value, environ) if isinstance(value, str) else value


def _secret_values(environ: Mapping[str, str]) -> Iterable[str]:
    name = re.compile(rf"(?i){_SECRET_NAME}s?$|_key$|_pat$")
    return sorted((v for k, v in environ.items() if name.search(k) and len(v) >= 8), key=len, reverse=True)


def collect(argv: Sequence[str] | None = None, devices: Sequence[Any] = (), folder: str | Path = ".") -> dict[str, Any]:
    """What goes into environment.json. JSON only.

    Args:
        argv: the command line; this process's own if None.
        devices: `jax.devices()`, for the names of the accelerators.
        folder: where the code of the experiment lies, for the git commit.
    """
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]] if argv is None else argv
    return {
        "command": shlex.join(redact_argv(argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "devices": sorted(f"{d.platform}: {d.device_kind}" for d in devices),
        "git": git(folder),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """{name: version} of what is installed."""
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def git(folder: str | Path = ".") -> dict[str, Any] | None:
    """The commit, the branch, the files that differ from it; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal") or ""
    return {
        "commit": commit.strip(),
        "branch": (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "remote": redact((_git(folder, "config", "--get", "remote.origin.url") or "").strip()) or None,
        "dirty": [redact(line) for line in status.splitlines()],
    }


def git_diff(folder: str | Path = ".") -> str:
    """What differs from the commit in tracked files, redacted; empty if nothing does, or outside a repository."""
    diff = redact(_git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff") or "")
    return diff if len(diff) <= MAX_DIFF else diff[:MAX_DIFF] + f"\n[cut: {len(diff)} characters]\n"


def _git(folder: str | Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, timeout=20, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def cpu_name() -> str:
    """The processor's name, from the kernel."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().total
