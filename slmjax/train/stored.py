"""Which parameters a run stores, and which of them it trains.

It stores the model's parameters and, under the key `view`, those that the view adds. It trains all but the frozen ones,
which stay in the training state (so that a checkpoint is complete) and are not changed by the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from slmjax import tree
from slmjax.types import Group, Params, ParamView

VIEW = "view"
"""Key of the view's own parameters beside the model's"""


def join(params: Params, own: Params) -> Params:
    """The model's parameters and the view's own -> stored parameters."""
    return {**params, VIEW: own} if own else params


def parts(stored: Params) -> tuple[Params, Params]:
    """Stored parameters -> the model's, and the view's own (`{}` if none)."""
    if not (isinstance(stored, Mapping) and VIEW in stored):
        return stored, {}
    return {name: x for name, x in stored.items() if name != VIEW}, stored[VIEW]


def trained(stored: Params, frozen: Set[str]) -> Params:
    """The trained parameters, as a nested dict without the frozen ones."""
    return tree.without(stored, frozen) if frozen else stored


def complete(of_trained: Params, stored: Params, frozen: Set[str]) -> Params:
    """Stored parameters with the trained ones replaced by `of_trained`."""
    if not frozen:
        return of_trained
    return tree.unflatten(tree.flatten(stored) | tree.flatten(of_trained))


def optimized(axes: Any, view: ParamView) -> tuple[Any, dict[str, Group]]:
    """The arguments of `OptimizerSpec.build` for the trained parameters: their logical axes, and {path: group} of those
    that the view adds."""
    flat = tree.flatten(join(axes, view.axes), is_leaf=tree.is_axes)
    own = [path for path in flat if path.startswith(f"{VIEW}/")] if view.axes else []
    groups = {path: view.groups.get(path.removeprefix(f"{VIEW}/"), Group()) for path in own}
    return tree.unflatten({path: a for path, a in flat.items() if path not in view.frozen}), groups
