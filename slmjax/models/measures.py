"""The parameters of a model beside those of a smaller model of the same kind: by how much each has more inputs and
outputs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from jax.nn import initializers

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Queries
from slmjax.nn.initial import Initial, Normal, Role
from slmjax.optim.matrices import by_path, matrix

UNEMBEDDING = "unembed/table"
"""The path of an untied output table"""


class Measure(NamedTuple):
    """One parameter of a model, and the same parameter of the base model."""

    inside: bool
    """Whether it belongs to a layer"""
    inputs: tuple[float, float] | None
    """Of a matrix: how many numbers are summed for each output, in the model and in the base. None for tables, gains,
    biases and taps of convolutions"""
    outputs: tuple[float, float] | None
    """Of a matrix: its outputs, in the model and in the base"""
    shared: float
    """Of a gain that all heads of a layer share: heads of the model over those of the base; else 1"""


def measures(model: Decoder, base: Decoder) -> dict[str, Measure]:
    """Each parameter of the model by path, beside that of the base.

    Raises:
        UserError: the base has no such parameter.
    """
    ours, theirs = roles(model), roles(base)
    return {path: _measure(path, axes, model, base, ours, theirs) for path, axes in by_path(model.axes()).items()}


def _measure(
    path: str, axes: Any, model: Decoder, base: Decoder, ours: Mapping[str, Role], theirs: Mapping[str, Role]
) -> Measure:
    inside = path.startswith("layers")
    role = ours.get(path)
    if role is None:
        shared = "head_dim" in axes and not {"heads", "kv_heads"} & set(axes)
        return Measure(inside, None, None, _heads(model) / _heads(base) if shared else 1.0)
    same = same_role(role, theirs)
    if role.fan_in is None or same.fan_in is None:
        return Measure(inside, None, None, 1.0)
    return Measure(inside, (role.fan_in, same.fan_in), (_outputs(role), _outputs(same)), 1.0)


def same_role(role: Role, theirs: Mapping[str, Role]) -> Role:
    """The role of the same parameter in another model (`roles`), whose layers may be arranged in other stages.

    Raises:
        UserError: it has none, or several of different sizes.
    """
    name = _name(role.path)
    found = {path: other for path, other in theirs.items() if _name(path) == name}
    if len({other.shape for other in found.values()}) == 1:
        return next(iter(found.values()))
    if role.path in found:
        return found[role.path]
    if found:
        raise UserError(
            f"parametrisation.base: its layers have {name} in several sizes, and none is at {role.path}; let the base "
            "repeat the same pattern of layers as the model"
        )
    raise UserError(
        f"parametrisation.base: it has no parameter {name}, which the model has; give a smaller model of the same kind "
        f"(its matrices are: {', '.join(sorted(set(map(_name, theirs))))})"
    )


def roles(model: Decoder) -> Mapping[str, Role]:
    """The role of each matrix and table, by path."""
    return _roles(replace(model, initial=Normal()))


@functools.lru_cache(maxsize=64)
def _roles(model: Decoder) -> Mapping[str, Role]:
    noting = _Noting()
    replace(model, initial=noting).declared()
    return noting.roles


class _Noting(Initial):
    """Notes the roles for which initial values are asked."""

    def __init__(self) -> None:
        self.roles: dict[str, Role] = {}

    def __call__(self, role: Role) -> tuple[Any, str]:
        self.roles[role.path] = role
        return initializers.zeros, "zeros"


def _name(path: str) -> str:
    """`attn/q` for `layers/attn/q` and `layers_1/0/attn/q`; paths outside the layers as they are."""
    return re.sub(r"^layers(_\d+)?/(\d+/)?", "", path)


def _outputs(role: Role) -> float:
    found = matrix(role.axes, role.path)
    assert found is not None, role.path
    sides = (math.prod(role.shape[i] for i in side) for side in found)
    return max(math.prod(sides) / (role.fan_in or 1), 1.0)


def _heads(model: Decoder) -> float:
    return next((block.mixer.heads for block in model.blocks() if isinstance(block.mixer, Queries)), 1)
