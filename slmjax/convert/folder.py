"""Writes a folder atomically: it appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator

from slmjax.errors import StorageError, UserError

MARK = "slmjax_export.json"
"""A file in every folder written by an export. Only a folder with this file is ever replaced."""


class Rejected(StorageError):
    """An export failed one of its checks. What was written is kept under a name ending in `.failed`."""


@contextlib.contextmanager
def publish(out: pathlib.Path, *, overwrite: bool | None) -> Iterator[pathlib.Path]:
    """Context manager: yields a new folder beside `out`, renamed to `out` when the block ends without an error.

    A process killed in the block leaves `out` as it was and a `.NAME.partial-*` folder, which the next call removes.
    If the block raises `Rejected` the folder is renamed to NAME.failed; on any other exception it is removed.

    Raises:
        UserError: `out` is a file, or is not empty and may not be replaced.
        StorageError: the disk is full or not writable.
    """
    out = out.absolute()
    check_free(out, overwrite=overwrite)
    me = f"{socket.gethostname()}-{os.getpid()}"
    partial = out.with_name(f".{out.name}.partial-{me}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        partial.mkdir()
        yield partial
        _sync(partial)
        check_free(out, overwrite=overwrite)
        if out.exists() and any(out.iterdir()):
            old = out.with_name(f".{out.name}.replaced-{me}")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except Rejected as e:
        failed = next(p for p in _failed_names(out) if not p.exists())
        partial.rename(failed)
        raise Rejected(f"{e}; what was written is kept in {failed}") from e
    except OSError as e:
        raise StorageError(f"cannot write {out}: {e.strerror or e}; nothing was changed there") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: pathlib.Path, *, overwrite: bool | None) -> None:
    """Raises UserError unless a folder may be written to `out`. `overwrite` None: the command has no --overwrite."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a new or empty folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        hint = "" if overwrite is None else " or add --overwrite"
        raise UserError(f"--out {out} is not empty; choose another folder{hint}")
    if not (out / MARK).is_file():
        raise UserError(f"--out {out} was not written by an export (it has no {MARK}), so it is not replaced")


def _failed_names(out: pathlib.Path) -> Iterator[pathlib.Path]:
    yield out.with_name(f"{out.name}.failed")
    yield from (out.with_name(f"{out.name}.{i}.failed") for i in range(2, 10**6))


def remove_abandoned(out: pathlib.Path) -> None:
    """Removes partial writes of `out` by processes of this machine that no longer run."""
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for left in out.parent.glob(f"{_literal(prefix)}*"):
        pid = left.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: pathlib.Path) -> None:
    """Flushes files to disk before the rename, so that a power cut cannot leave empty files under the final name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
