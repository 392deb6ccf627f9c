"""Errors that a user can fix, each with the exit code its process ends with.

The command line prints `str(error)` as one line on stderr, without a traceback, and exits with `error.code`.
A message names the field or file, the value, what was expected and the fix.
"""

import math
from typing import Any, TypeGuard


class UserError(Exception):
    """A mistake in the command, the experiment or a file given by the user."""

    code = 2


def is_number(x: Any) -> TypeGuard[int | float]:
    """Whether x is a plain Python number, whose value can be checked; an array may be traced, so its value cannot."""
    return isinstance(x, int | float)


def positive(**values: float | None) -> None:
    """Checks that each named value is a finite number above 0; None (an unused field) passes.

    Raises:
        UserError: one is not; the message names it.
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
    """The process received SIGTERM or SIGUSR1 and has saved a checkpoint: run the same command again to go on."""

    code = 75


class Lost(UserError):
    """Another process of the run has died or hangs: start all of them again."""

    code = 75
