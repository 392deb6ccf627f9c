"""Tables on a terminal of any width: words may break, numbers do not."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

WIDE = 160
"""Columns where the output is no terminal and $COLUMNS does not say"""
NUMBER = re.compile(r"[^/]*\d[^/]*")
"""A word that is not broken: one with a digit that is no path"""


def console() -> Any:
    """A `rich.console.Console` on standard output."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(highlight=False, width=width)


def show(table: Any, on: Any = None) -> None:
    """Prints a `rich.table.Table`. On a narrow terminal its texts are broken over lines; where not even the numbers fit
    beside each other, the lines are longer than the terminal, which breaks them itself: nothing is cut off."""
    on = console() if on is None else on
    needed = 1
    for column in table.columns:
        cells = [column.header, *column.cells]
        words = [word for cell in cells for word in str(cell).split() if NUMBER.fullmatch(word)]
        shortest = max([1, *map(len, words), *(len(str(cell)) for cell in cells if column.no_wrap)])
        column.min_width, column.overflow = max(shortest, column.min_width or 0), "fold"
        needed += column.min_width + 3  # a space on each side, and a line
    before = on.width
    on.width = max(before, needed)
    on.print(table, crop=False)
    on.width = before
