"""Mistakes that a user can mend, each with the exit code its process ends with.

The command line prints `str(error)` as one line on stderr, without a traceback, and exits with `error.code`.
A message names the field or file, the value, what was expected and the fix.
"""

import math
from typing import Any, TypeGuard


class UserError(Exception):
    """A mistake in the command, the experiment or a file given by the user."""

    code = 2


def is_number(x: Any) -> TypeGuard[int | float]:
    """Whether x is a plain number, such as a person gives: those are checked. Arrays may be traced, and cannot be."""
    return isinstance(x, int | float)


def positive(**values: float | None) -> None:
    """Checks fields of a value; None stands for a field that is not used.

    Raises:
        UserError: one is no finite number above 0; it is named.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}: {value} is not a positive number")


class Diverged(UserError):
    """Training stopped because the loss is not finite or keeps spiking."""

    code = 3


class DataError(UserError):
    """A corpus, token store or tokenizer is missing, corrupt, or does not fit."""

    code = 4


class StorageError(UserError):
    """A checkpoint or export cannot be written or read: disk full, no permission, corrupt."""

    code = 5


class Preempted(Exception):
    """The process was told to stop (SIGTERM, SIGUSR1) and has saved: run the same command again."""

    code = 75


class Lost(UserError):
    """Another process of the run is gone: start all of them again."""

    code = 75
