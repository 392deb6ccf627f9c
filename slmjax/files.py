"""Paths as users write them, and text files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from slmjax.errors import StorageError, UserError


def at(place: str | Path) -> Path:
    """The path that a user wrote, in an option, an experiment, a recipe or a notebook: a leading ~ is the home folder,
    which a shell replaces at the beginning of a word alone (not in --out=~/here). Every such path comes through here.

    Raises:
        UserError: ~NAME is the home of no user.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise UserError(f"{place}: there is no home folder of that name; write the whole path") from None


def write_text(file: Path, text: str) -> None:
    """Writes a file atomically: a crash leaves the old one or the new one. Makes its folder.

    Raises:
        StorageError: it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}") from error
