"""Tables on terminals that are too narrow for them."""

import io

import pytest

from slmjax.cli import tables

NUMBERS = ("1,234,567,890", "0.0123", "97.5%", "4.1e+20")


@pytest.mark.fast
@pytest.mark.parametrize("width", [20, 40, 60, 160])
def test_no_number_is_cut_or_broken(width):
    from rich.console import Console
    from rich.table import Table

    table = Table(title="a title that is longer than the terminal is wide")
    for column in ("name", "one", "two", "three", "a longer header of words"):
        table.add_column(column)
    table.add_row("a name of several words, none of which may be lost", *NUMBERS)
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    tables.show(table, console)
    shown = out.getvalue()
    assert all(number in shown for number in NUMBERS)
    assert "…" not in shown
    words = "".join(shown.split())
    for letter in "severallost":
        assert letter in words
    assert console.width == width
    longest = max(len(line.rstrip()) for line in shown.splitlines())
    assert longest <= max(width, 64), "only as wide as its numbers and longest words"
