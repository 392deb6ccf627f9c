"""Hyperball: matrices keep the norm that they began with, and each step has a length in proportion to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slmjax import tree
from slmjax.axes import STACKED
from slmjax.errors import UserError, is_number
from slmjax.optim.groups import with_own_decay, with_own_eps, with_own_rate
from slmjax.optim.matrices import by_path, inner_matrices
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Curve
from slmjax.types import Group


@dataclass(frozen=True, kw_only=True)
class AdamH(AdamW):
    """Adam on the sphere ("AdamH") for the matrices inside the layers; Adam for tables, gains, biases and the taps of
    short convolutions.

    With u Adam's direction, R the Frobenius norm that a layer's matrix W (heads flattened) began with:

        W <- R * normed(W - lr * R * normed(u)),  normed(x) = x / |x|

    So the learning rate is an angle, in radians a step, and there is no weight decay. The authors start from
    sqrt(lr * weight_decay) of a tuned AdamW. Parameters under Adam have the learning rate times `adam_rate`.

    References:
        Wen et al. 2026, Fantastic Pretraining Optimizers and Where to Find Them II, arXiv:2606.16899
    """

    weight_decay: float = 0.0
    adam_rate: float = 0.1
    """Factor on the learning rate of the parameters under Adam"""
    not_hyperball: tuple[str, ...] = ()
    """Path patterns of matrices that are left to Adam as well"""

    def __post_init__(self):
        super().__post_init__()
        if not (is_number(self.weight_decay) and self.weight_decay == 0):
            raise UserError(
                f"optimizer.weight_decay is {self.weight_decay}; AdamH fixes norms instead, so leave it at 0"
            )
        if is_number(self.adam_rate) and not self.adam_rate > 0:
            raise UserError(f"optimizer.adam_rate is {self.adam_rate}; it must be positive")

    def step_norms(self, axes: Any) -> Mapping[str, Any]:
        raise UserError(
            "optimizer AdamH: its steps are measured by the norm of each matrix, and no rule is known for its learning "
            "rates under muP; train a model without muP"
        )

    def descend(self, schedule: Curve, axes: Any, groups: Mapping[str, Group]) -> optax.GradientTransformation:
        spheres = tuple(path for path in inner_matrices(axes, self.not_hyperball) if path not in groups)
        return optax.chain(
            *with_own_eps(groups),
            self.direction(axes),
            *with_own_decay(axes, groups),
            *with_own_rate(groups),
            along_spheres(schedule, axes, spheres, self.adam_rate),
        )


class Spheres(NamedTuple):
    """The state of `along_spheres`."""

    count: jax.Array
    """Steps taken, int32 []"""
    radii: dict[str, jax.Array]
    """By path, the norm of each matrix: float32, with the stacking dimensions of the parameter and 1 for all others"""


def along_spheres(
    schedule: Curve, axes: Any, paths: tuple[str, ...], others: Any = 1.0
) -> optax.GradientTransformation:
    """Directions -> updates: each matrix of these paths goes a step along the sphere on which it began; what is left
    descends by the learning rate times `others`."""
    sides = {
        path: tuple(i for i, name in enumerate(a) if name not in STACKED)
        for path, a in by_path(axes).items()
        if path in paths
    }

    def norm(path: str, x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=sides[path], keepdims=True))

    def init(params):
        flat = tree.flatten(params)
        return Spheres(jnp.zeros((), jnp.int32), {path: norm(path, flat[path]) for path in paths})

    def update(updates, state, params=None):
        rate, flat = schedule(state.count), tree.flatten(params)

        def moved(path: str, u: jax.Array) -> jax.Array:
            w, radius = flat[path], state.radii[path]
            ahead = w - rate * radius * _over(u, norm(path, u))
            return radius * _over(ahead, norm(path, ahead)) - w

        out = tree.map_with_path(lambda path, u: moved(path, u) if path in sides else -rate * others * u, updates)
        return out, Spheres(state.count + 1, state.radii)

    return optax.GradientTransformation(init, update)


def _over(x: jax.Array, norm: jax.Array) -> jax.Array:
    """x / norm; 0 where x is 0."""
    return x / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
