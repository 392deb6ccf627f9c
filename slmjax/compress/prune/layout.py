"""Which parameters are pruned, and their matrices as [output channels, input channels] whatever the order of their
dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slmjax import tree
from slmjax.compress.quant.blocks import Axes, Shape, Sides, sides
from slmjax.compress.quant.view import of_layers
from slmjax.errors import UserError
from slmjax.optim.matrices import matrix
from slmjax.views import selected


def prunable(axes: Any, patterns: tuple[str, ...] = ()) -> dict[str, Axes]:
    """{path: logical axes} of the parameters to prune.

    Args:
        axes: of the model's parameters (`Model.axes`).
        patterns: globs of paths, such as `layers*/mlp/*`, `embed/table`; empty: every matrix of the layers.

    Raises:
        UserError: a pattern matches no parameter, or one that is not a matrix; there is nothing to prune.
    """
    if patterns:
        chosen = selected(axes, patterns)
    else:
        flat = tree.flatten(axes, is_leaf=tree.is_axes)
        chosen = {path: a for path, a in flat.items() if of_layers(path, a)}
    for path, a in chosen.items():
        if matrix(a, path) is None or "tap" in a:
            raise UserError(
                f"patterns: {path} has the axes {', '.join(map(str, a))}, so it is not a matrix and cannot be pruned; "
                "name matrices only, such as layers*/mlp/*"
            )
    if not chosen:
        raise UserError("patterns: the model has no matrix in its layers; name the parameters to prune")
    return chosen


def to_matrices(w: Any, axes: Axes, path: str) -> Any:
    """A parameter (numpy or jax) -> its matrices [S, out, in], those that it stacks in the first dimension.

    The input channels of an attention's output projection are (heads, head_dim), the last varying fastest, as in the
    formats of other libraries. The rows of a table [V, D] are its outputs.
    """
    found = sides(axes, path)
    sizes = (math.prod(w.shape[d] for d in side) for side in (found.stacked, found.outputs, found.inputs))
    return w.transpose(_order(found)).reshape(tuple(sizes))


def from_matrices(matrices: Any, shape: Shape, axes: Axes, path: str) -> Any:
    """The inverse of `to_matrices`: [S, out, in] -> a parameter of this shape."""
    order = _order(sides(axes, path))
    back = tuple(int(d) for d in np.argsort(order))
    return matrices.reshape(tuple(shape[d] for d in order)).transpose(back)


def _order(found: Sides) -> tuple[int, ...]:
    return (*found.stacked, *found.outputs, *found.inputs)
