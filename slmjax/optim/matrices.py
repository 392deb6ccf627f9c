"""Which dimensions of a parameter form a matrix: matrices are decayed, and Muon and Adafactor treat each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slmjax import tree
from slmjax.axes import APART, KNOWN, STACKED
from slmjax.errors import UserError

Axes = tuple[str | None, ...]
"""The logical axis names of one parameter"""


StepNorm = Callable[[float, float], float]
"""(inputs, outputs) of a matrix -> the largest spectral norm, up to a constant, that its change in a step of learning
rate 1 can have. Learning rates for other widths follow from it: Yang, Simon and Bernstein 2023, arXiv:2310.17813"""


def entrywise(inputs: float, outputs: float) -> float:
    """Each entry moves by about 1, as under Adam and Lion: changes with aligned signs are a matrix of rank one."""
    return math.sqrt(inputs * outputs)


def orthogonal(inputs: float, outputs: float) -> float:
    """Every singular value of the change is the square root of the longer side, as under `Muon`."""
    return math.sqrt(max(inputs, outputs))


class Matrix(NamedTuple):
    """Which dimensions of a parameter are the rows and which the columns of a matrix; the other dimensions stack such
    matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix(axes: Axes, path: str = "") -> Matrix | None:
    """The dimensions of the matrix (or stacked matrices) in a parameter with these axes; None for a gain or a bias.

    Example: `("layers", "embed", "heads", "head_dim")` gives rows (1,) and columns (2, 3).

    Args:
        path: of the parameter, for messages.

    Raises:
        UserError: an axis has an unknown name, stacks matrices but does not come first, or there are more dimensions
            than a matrix has. Such a parameter would silently get neither weight decay nor Muon.
    """
    where = f"{path or 'a parameter'} has the axes {', '.join(map(str, axes))}"
    groups: list[tuple[int, ...]] = []
    for dimension, name in enumerate(axes):
        if name is not None and name not in KNOWN:
            raise UserError(f"{where}: {name!r} is unknown; expected one of {', '.join(KNOWN)}, or None for any other")
        if name in STACKED:
            if groups:
                raise UserError(f"{where}: {name!r} stacks matrices and must come before the dimensions of the matrix")
        elif name == "head_dim" and groups and axes[dimension - 1] in ("heads", "kv_heads"):
            groups[-1] += (dimension,)
        else:
            groups.append((dimension,))
    if len(groups) > 2:
        raise UserError(
            f"{where}: a matrix has two dimensions besides {' and '.join(STACKED)}; heads and their head_dim are one"
        )
    return Matrix(*groups) if len(groups) == 2 else None


def by_path(axes: Any) -> dict[str, Axes]:
    """A tree whose leaves are axes -> {path: axes}."""
    return tree.flatten(axes, is_leaf=tree.is_axes)


def mask(axes: Any, patterns: Sequence[str]) -> Any:
    """A tree of bools: which parameters a pattern matches.

    Raises:
        UserError: a pattern matches no parameter.
    """
    return tree.mask(tree.unflatten(dict.fromkeys(by_path(axes), False)), patterns)


def matrices(axes: Any) -> dict[str, Matrix]:
    """Every matrix and table of these parameters, by path.

    Raises:
        UserError: an axis of a parameter is unknown.
    """
    return {path: m for path, a in by_path(axes).items() if (m := matrix(a, path)) is not None}


def inner_matrices(axes: Any, excluded: Sequence[str] = ()) -> dict[str, Matrix]:
    """Those of `matrices` that map vectors to vectors: no tables, no taps of convolutions, nothing that a pattern of
    `excluded` matches.

    Raises:
        UserError: a pattern of `excluded` matches no parameter, or an axis of a parameter is unknown.
    """
    left_out, axes_of = tree.flatten(mask(axes, excluded)), by_path(axes)
    return {
        path: m
        for path, m in matrices(axes).items()
        if not left_out[path] and not any(name in APART for name in axes_of[path])
    }
