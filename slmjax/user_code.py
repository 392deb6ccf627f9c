"""Python files of the user: an error in one becomes a one-line message with file and line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from slmjax.errors import UserError


@contextlib.contextmanager
def mistakes_in(file: Path, shown: str) -> Iterator[None]:
    """Turns any exception raised inside the `with` block into a UserError.

    Args:
        file: the user's file; the message names its innermost line in the traceback.
        shown: the file's name in the message, as the user wrote it.

    Raises:
        UserError: `shown:line: what is wrong`; a UserError raised inside is passed on unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        place = shown if error.filename in (str(file), shown) else error.filename
        raise UserError(f"{place}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        about = f": {error}" if str(error) else ""
        raise UserError(f"{shown}{_line(error, file)}: {type(error).__name__}{about}") from error


def _line(error: BaseException, file: Path) -> str:
    """`:12`, the innermost line of the file that the exception passed through."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file.resolve():
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def find_beside(file: Path) -> None:
    """Lets modules in the file's folder be imported; a module of the same name elsewhere takes precedence."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
