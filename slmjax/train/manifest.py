"""SHA-256 of every file of a folder, in the format of `sha256sum`, so that anyone can check it by hand.

Orbax 0.12 restores files with flipped bits without an error in most layouts, so a checkpoint is checked against this
file before it is restored.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"
_AFTER = {NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}
"""Files that are not listed: the manifest, and those that Orbax writes after it and does not read to restore"""


def _files(folder: Path) -> dict[str, Path]:
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p for name, p in files.items() if name not in _AFTER}


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(folder: Path) -> None:
    """Writes the manifest of a complete folder, and waits until all its files are on disk (fsync)."""
    files = _files(folder)
    lines = [f"{_sha256(path)}  {name}\n" for name, path in files.items()]
    (folder / NAME).write_text("".join(lines))
    for path in (*files.values(), folder / NAME, folder):
        _sync(path)


def problems(folder: Path) -> list[str]:
    """What is wrong with the folder, one line a file; empty if every byte is as it was written."""
    try:
        lines = (folder / NAME).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return [f"{NAME} is missing or unreadable ({type(error).__name__})"]
    actual = {name: _sha256(path) for name, path in _files(folder).items()}
    missing = [f"{name} is missing" for name in expected if name not in actual]
    unlisted = [f"{name} is not in {NAME}" for name in actual if name not in expected]
    changed = [f"{name} has changed" for name, digest in actual.items() if expected.get(name, digest) != digest]
    return missing + unlisted + changed
