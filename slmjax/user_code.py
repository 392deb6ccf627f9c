"""Python that the user wrote: what goes wrong in it is said in one line, with its place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from slmjax.errors import UserError


@contextlib.contextmanager
def mistakes_in(file: Path, shown: str) -> Iterator[None]:
    """Turns whatever is raised within into a UserError.

    Args:
        file: the user's file, whose innermost line on the way to the mistake is named.
        shown: how the user calls it.

    Raises:
        UserError: `shown:line: what is wrong`; one that was raised within is passed on as it is.
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
    """Modules in the file's folder can be imported, after all others."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
