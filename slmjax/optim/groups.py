"""Parameters with a learning rate, a weight decay or an Adam epsilon of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from slmjax import tree
from slmjax.errors import is_number
from slmjax.types import Group


def without(axes: Any, groups: Mapping[str, Group]) -> Any:
    """The axes, with `()` for every parameter that has a group: like a vector, so the optimizer does not decay it."""
    return tree.map_with_path(lambda path, a: () if path in groups else a, axes, is_leaf=tree.is_axes)


def with_own_eps(groups: Mapping[str, Group]) -> list[optax.GradientTransformation]:
    """Divides the gradients of each group by its factor on Adam's epsilon, which comes to the same as that factor:
    (m / f) / (sqrt(v) / f + eps) = m / (sqrt(v) + f * eps). Directions that do not depend on the size of the gradients
    stay as they are. Before the optimizer's direction; empty if no group has such a factor."""
    own = {path: group.eps for path, group in groups.items() if not _is(group.eps, 1)}

    def scale(updates, params=None):
        return tree.map_with_path(lambda path, g: g / own[path] if path in own else g, updates)

    return [optax.stateless(scale)] if own else []


def with_own_decay(axes: Any, groups: Mapping[str, Group]) -> list[optax.GradientTransformation]:
    """Adds each group's weight decay. After the optimizer's direction; empty if no group is decayed."""

    def of(path: str, group: Group) -> optax.GradientTransformation:
        mask = tree.map_with_path(lambda p, _: p == path, axes, is_leaf=tree.is_axes)
        return optax.add_decayed_weights(group.weight_decay, mask)

    return [of(path, group) for path, group in groups.items() if not _is(group.weight_decay, 0)]


def with_own_rate(groups: Mapping[str, Group]) -> list[optax.GradientTransformation]:
    """Multiplies the updates of each group by its factor on the learning rate. After the decay; empty if no group has
    such a factor."""
    own = {path: group.rate for path, group in groups.items() if not _is(group.rate, 1)}

    def scale(updates, params=None):
        return tree.map_with_path(lambda path, u: u * own[path] if path in own else u, updates)

    return [optax.stateless(scale)] if own else []


def _is(number: Any, value: float) -> bool:
    return is_number(number) and number == value
