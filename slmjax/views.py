"""Views: stored parameters -> the effective parameters that the model computes with.

A view is a frozen dataclass whose `build` returns the pure functions (`types.ParamView`). `chain` composes them: fake
quantization after an average, a mask before a low-rank update, without the step knowing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.errors import UserError
from slmjax.types import Group, Key, Params, ParamView

IDENTITY = ParamView(
    init=lambda params, key: ({}, ()),
    apply=lambda params, own, state: params,
    update=lambda state, params, own, step: state,
    evaluate=lambda params, own, state: params,
)
"""Effective parameters are the stored ones"""


@dataclass(frozen=True, kw_only=True)
class View(ABC):
    """The field of an experiment that decides which parameters the model computes with."""

    @abstractmethod
    def build(self, axes: Any) -> ParamView:
        """The pure functions of this view.

        Args:
            axes: logical axes of the model's parameters (`Model.axes`), a nested dict of tuples of names.
        """

    def over(self, steps: int) -> View:
        """This view in a run of that many steps: shares of the run become numbers of steps.

        Raises:
            UserError: it makes no sense in such a run.
        """
        return self


def stateless(
    apply: Callable[[Params, Params], Params],
    *,
    own: Callable[[Params, Any], Params] = lambda params, key: {},
    axes: Any = {},  # noqa: B006
    groups: Mapping[str, Group] = {},
    frozen: frozenset[str] = frozenset(),
) -> ParamView:
    """A view without a state, which computes the same in training and evaluation.

    Args:
        apply: (model's parameters, own) -> effective parameters.
        own: (model's parameters, key) -> the trainable parameters that the view adds.
        axes, groups, frozen: see `ParamView`.
    """
    return ParamView(
        init=lambda params, key: (own(params, key), ()),
        apply=lambda params, own, state: apply(params, own),
        update=lambda state, params, own, step: state,
        evaluate=lambda params, own, state: apply(params, own),
        axes=axes,
        groups=groups,
        frozen=frozen,
    )


def selected(axes: Any, patterns: tuple[str, ...]) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axes} of the model's parameters that a pattern matches.

    Raises:
        UserError: a pattern matches no parameter.
    """
    flat = tree.flatten(axes, is_leaf=tree.is_axes)
    mask = tree.flatten(tree.mask(tree.unflatten(dict.fromkeys(flat, False)), patterns))
    return {path: flat[path] for path, chosen in mask.items() if chosen}


@dataclass(frozen=True, kw_only=True)
class Identity(View):
    """The stored parameters as they are."""

    def build(self, axes: Any) -> ParamView:
        return IDENTITY


@dataclass(frozen=True, kw_only=True)
class EMA(View):
    """Evaluates and exports an exponential moving average of the parameters; training does not see it.

    What is averaged are the model's parameters and those that the view `of` adds (learned scales, adapters); parameters
    that it freezes are not copied. `EMA(of=Quantize(...))` evaluates the rounded average with averaged scales.

    After the update of step t (from 0), `average = d * average + (1 - d) * params` with
    `d = min(decay, (1 + t) / (10 + t))`: early on it forgets faster, or the initial values would linger.

    References:
        Polyak and Juditsky 1992; the warm-up as in `tf.train.ExponentialMovingAverage`
    """

    decay: float = 0.999
    of: View = Identity()
    """The view that is trained"""

    def __post_init__(self):
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"view.decay is {self.decay}; it must be at least 0 and below 1, such as 0.999")

    def over(self, steps: int) -> View:
        return replace(self, of=self.of.over(steps))

    def build(self, axes: Any) -> ParamView:
        of = self.of.build(axes)

        def averaged(params, own):
            flat = tree.flatten(params)
            return {path: x for path, x in flat.items() if path not in of.frozen}, own

        def init(params, key):
            own, state = of.init(params, key)
            return own, (jax.tree.map(jnp.copy, averaged(params, own)), state)

        def update(states, params, own, step):
            average, state = states
            t = jnp.asarray(step, jnp.float32)
            keep = jnp.minimum(self.decay, (1.0 + t) / (10.0 + t))
            new = jax.tree.map(lambda a, p: a + (1.0 - keep) * (p - a), average, averaged(params, own))
            return new, of.update(state, params, own, step)

        def parts(params, states):
            (flat, own), state = states
            return tree.unflatten(tree.flatten(params) | flat), own, state

        return of._replace(
            init=init,
            apply=lambda params, own, states: of.apply(params, own, states[1]),
            update=update,
            evaluate=lambda params, own, states: of.evaluate(*parts(params, states)),
            pack=lambda params, own, states: of.pack(*parts(params, states)),
        )


@dataclass(frozen=True, kw_only=True)
class Chain(View):
    """Several views, the first nearest to the stored parameters."""

    views: tuple[View, ...]

    def over(self, steps: int) -> View:
        return replace(self, views=tuple(view.over(steps) for view in self.views))

    def build(self, axes: Any) -> ParamView:
        return chain(*(view.build(axes) for view in self.views))


def chain(*views: ParamView) -> ParamView:
    """The composition: each view takes the effective parameters of the one before as its stored ones.

    Its state is the tuple of the views' states (for a single view, that view's state; for none, `()`). Its own
    parameters are those of view i under the key i. A parameter that any view freezes is frozen. Only what the last view
    rounds can be packed, for a later view might change it.
    """
    if not views:
        return IDENTITY
    if len(views) == 1:
        return views[0]

    def each(own, states):
        return ((view, own.get(str(i), {}), state) for i, (view, state) in enumerate(zip(views, states, strict=True)))

    def init(params, key):
        added, states = {}, []
        for i, view in enumerate(views):
            own, state = view.init(params, jax.random.fold_in(key, i))
            added |= {str(i): own} if own else {}
            states.append(state)
            params = view.apply(params, own, state)
        return added, tuple(states)

    def apply(params, own, states):
        for view, view_own, state in each(own, states):
            params = view.apply(params, view_own, state)
        return params

    def update(states, params, own, step):
        new = []
        for view, view_own, state in each(own, states):
            new.append(view.update(state, params, view_own, step))
            params = view.apply(params, view_own, new[-1])
        return tuple(new)

    def evaluate(params, own, states):
        for view, view_own, state in each(own, states):
            params = view.evaluate(params, view_own, state)
        return params

    def pack(params, own, states):
        *before, (last, last_own, last_state) = each(own, states)
        for view, view_own, state in before:
            params = view.evaluate(params, view_own, state)
        return last.pack(params, last_own, last_state)

    return ParamView(
        init=init,
        apply=apply,
        update=update,
        evaluate=evaluate,
        pack=pack,
        axes={str(i): view.axes for i, view in enumerate(views) if view.axes},
        groups={f"{i}/{path}": group for i, view in enumerate(views) for path, group in view.groups.items()},
        frozen=frozenset().union(*(view.frozen for view in views)),
    )


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A trainable matrix that an objective has beside the model. Initial values are normal with variance 1 / rows."""

    shape: tuple[int, int]
    axes: tuple[str | None, str | None]
    """Logical axes (axes.py)"""

    def draw(self, key: Key) -> Any:
        """float32, of this shape."""
        return jax.random.normal(key, self.shape, jnp.float32) * self.shape[0] ** -0.5


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What an objective keeps from step to step beside the model: trainable matrices, and the number of updates."""

    matrices: Mapping[str, Matrix]
    """By path"""


OBJECTIVE = "objective"
"""Key, beside the model's parameters, of what an objective has carried to this step"""


def carrying(view: ParamView, carried: Carried) -> ParamView:
    """The view, with what the objective carries.

    The effective parameters of a training step get one more key, `OBJECTIVE`: `own`, the matrices as a nested dict, and
    `step`, int32 [], the updates made so far (skipped ones not counted). Evaluation and export do not see it. The
    view's state is the pair of its own state and the step.
    """

    def inner(own: Params) -> Params:
        return {name: x for name, x in own.items() if name != OBJECTIVE}

    def init(params: Params, key: Key) -> tuple[Params, Any]:
        own, state = view.init(params, key)
        keys = jax.random.split(jax.random.fold_in(key, 1), max(1, len(carried.matrices)))
        drawn = {path: m.draw(k) for (path, m), k in zip(carried.matrices.items(), keys, strict=False)}
        mine = {OBJECTIVE: tree.unflatten(drawn)} if drawn else {}
        return {**own, **mine}, (state, jnp.zeros((), jnp.int32))

    def apply(params: Params, own: Params, state: Any) -> Params:
        return {
            **view.apply(params, inner(own), state[0]),
            OBJECTIVE: {"own": own.get(OBJECTIVE, {}), "step": state[1]},
        }

    matrix_axes = tree.unflatten({path: m.axes for path, m in carried.matrices.items()})
    return view._replace(
        init=init,
        apply=apply,
        update=lambda state, params, own, step: (view.update(state[0], params, inner(own), step), state[1] + 1),
        evaluate=lambda params, own, state: view.evaluate(params, inner(own), state[0]),
        pack=lambda params, own, state: view.pack(params, inner(own), state[0]),
        axes={**view.axes, OBJECTIVE: matrix_axes} if matrix_axes else view.axes,
    )


def without_objective(params: Params) -> tuple[Params, Any]:
    """Effective parameters -> those of the model, and what the objective has carried to this step (None in
    evaluation)."""
    return {name: x for name, x in params.items() if name != OBJECTIVE}, params.get(OBJECTIVE)
