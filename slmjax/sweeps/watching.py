"""Fits the law again while the cells of a sweep run, and ends it early once a prediction is sure enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slmjax.errors import UserError
from slmjax.sweeps.folder import Folder, State


@dataclass
class Watch:
    """Fits the law again whenever a cell has become complete."""

    folder: Folder
    until: float | None
    say: Callable[[str], None]
    complete: int = 0

    def __call__(self, states: dict[str, State]) -> bool:
        """Whether cells were left out, since the prediction of the held-out one is narrow enough."""
        held_out = self.folder.held_out
        done = sum(s.name == "complete" for h, s in states.items() if held_out is None or h != held_out.hash)
        if held_out is None or done == self.complete or states[held_out.hash].name != "waiting":
            return False
        self.complete = done
        from slmjax.sweeps import narrowing  # with scipy, which sweeps without a held-out cell need not wait for

        try:
            found = narrowing.current(self.folder)
        except UserError:  # too few runs yet
            return False
        self.say(str(found))
        if self.until is None or not found.half_width <= self.until:
            return False
        count = narrowing.skip_the_rest(self.folder, states, found)
        if count:
            self.say(f"{count} cells are left out: the interval is at most {self.until:.2%}")
        return bool(count)


def share(text: str) -> float:
    """`1.5%` or `0.015`.

    Raises:
        UserError: it is no share between 0 and 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"--until-interval is {text!r}; expected a share of the loss such as 1.5%")
    return value
