"""Which dimensions of a parameter form a matrix: matrices are decayed, and Muon and Adafactor treat each by itself."""

from __future__ import annotations

from typing import NamedTuple

from slmjax.axes import KNOWN, STACKED
from slmjax.errors import UserError

Axes = tuple[str | None, ...]
"""The logical axis names of one parameter"""


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
