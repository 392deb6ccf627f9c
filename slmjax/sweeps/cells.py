"""A sweep is a tuple of cells, each an experiment and what to call its parameters; a Python file gives one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slmjax.config import Experiment
from slmjax.errors import UserError
from slmjax.experiment_file import load_value
from slmjax.models.flops import flops_per_token
from slmjax.serialise import fingerprint, to_json
from slmjax.user_code import mistakes_in

Tag = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A place in successive halving: the cell runs only if its candidate was good enough in the round before."""

    group: str
    """Cells of one group are compared with each other"""
    candidate: str
    """The same in every round"""
    round: int
    """From 0"""
    best: int
    """How many candidates of the round before go on; those of round 0 all run"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep, named by the hash of its experiment."""

    experiment: Experiment
    tags: Mapping[str, Tag] = field(default_factory=dict)
    """What sets it apart from the others, by name: columns of results.tsv and tags in W&B"""
    rung: Rung | None = None

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of the sha256 of the experiment without its name."""
        described = {name: value for name, value in to_json(self.experiment).items() if name != "name"}
        return fingerprint(described)[:16]

    @property
    def label(self) -> str:
        """`steps=100, seed=1`, for people."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.tags.items()) or self.experiment.name


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Cells that are run and compared.

    Raises:
        UserError: no cells, or two with the same experiment.
    """

    name: str
    cells: tuple[Cell, ...]
    held_out: Cell | None = None
    """A run that is not fitted: its loss is predicted from the others and written down, and only then does it run"""
    coupled: bool = False
    """The law of its predictions and of its report is `scaling.coupled.Coupled`, instead of Chinchilla's"""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise UserError(f"Sweep.name is {self.name!r}; expected a name without /")
        if not self.cells:
            raise UserError(f"sweep {self.name!r} has no cells")
        seen: dict[str, Cell] = {}
        for cell in self.everything:
            if cell.hash in seen:
                raise UserError(
                    f"sweep {self.name!r} has the same experiment twice: {seen[cell.hash].label} and {cell.label}; "
                    "remove one, or give them different seeds"
                )
            seen[cell.hash] = cell

    @property
    def everything(self) -> tuple[Cell, ...]:
        """The cells, and the one that is held out."""
        return self.cells if self.held_out is None else (*self.cells, self.held_out)


Cells = Experiment | Cell | Iterable[Any]
"""What the functions that make cells begin with: an experiment, a cell, or several of them"""


def cells(value: Cells) -> Iterator[Cell]:
    """Each of them as a cell.

    Raises:
        UserError: something else is among them.
    """
    for each in (value,) if isinstance(value, Experiment | Cell) else value:
        if not isinstance(each, Experiment | Cell):
            raise UserError(f"a sweep has {type(each).__name__} {each!r:.60}; expected an Experiment or a Cell")
        yield each if isinstance(each, Cell) else Cell(experiment=each)


def tagged(cell: Cell, experiment: Experiment, **tags: Tag) -> Cell:
    """The cell with another experiment and more tags."""
    return replace(cell, experiment=experiment, tags={**cell.tags, **tags})


def shown(value: Tag) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tokens(experiment: Experiment) -> int:
    """Tokens that a run trains on."""
    return experiment.steps * experiment.data.batch * experiment.data.length


def flops_a_token(experiment: Experiment) -> float:
    """Training FLOPs a token by convention (iii) of `models.flops`: head and attention counted, and what the objective
    adds (a teacher). A run's FLOPs are these times its tokens."""
    model, length = experiment.model, experiment.data.length
    return flops_per_token(model, length, experiment.objective.predicted).attention + experiment.objective.more_flops(
        model, length
    )


def load(ref: str) -> tuple[Sweep, Path | None]:
    """The sweep of a Python file, file.py:function or module:function, and the file.

    `sweep()` returns a `Sweep`, or yields experiments or cells; then the sweep has the file's name.

    Raises:
        UserError: there is no such file or function, it fails, or it gives something else.
    """
    value, file = load_value(ref, "sweep")
    if isinstance(value, Sweep):
        return value, file
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise UserError(f"{ref}: sweep() returned a {type(value).__name__}; expected a Sweep, or experiments")
    where = file or Path()
    with mistakes_in(where, str(ref)):  # a generator's code runs only now
        made: Any = tuple(cells(value))
    return Sweep(name=where.stem or "sweep", cells=made), file
