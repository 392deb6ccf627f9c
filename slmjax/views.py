"""Views: stored parameters -> the effective parameters that the model computes with.

A view is a frozen dataclass whose `build` returns the pure functions (`types.ParamView`). `chain` composes them: fake
quantization after an average, a mask before a low-rank update, without the step knowing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.types import ParamView

IDENTITY = ParamView(
    init=lambda params: (),
    apply=lambda params, state: params,
    update=lambda state, params, step: state,
    evaluate=lambda params, state: params,
)
"""Effective parameters are the stored ones"""


@dataclass(frozen=True, kw_only=True)
class View(ABC):
    """How an experiment says which parameters the model computes with."""

    @abstractmethod
    def build(self) -> ParamView:
        """The pure functions of this view."""


@dataclass(frozen=True, kw_only=True)
class Identity(View):
    """The stored parameters as they are."""

    def build(self) -> ParamView:
        return IDENTITY


@dataclass(frozen=True, kw_only=True)
class EMA(View):
    """Evaluates and exports an exponential moving average of the parameters; training does not see it.

    After the update of step t (from 0), `average = d * average + (1 - d) * params` with
    `d = min(decay, (1 + t) / (10 + t))`: early on it forgets faster, or the initial values would linger.

    References:
        Polyak and Juditsky 1992; the warm-up as in `tf.train.ExponentialMovingAverage`
    """

    decay: float = 0.999

    def __post_init__(self):
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"view.decay is {self.decay}; it must be at least 0 and below 1, such as 0.999")

    def build(self) -> ParamView:
        def update(average, params, step):
            t = jnp.asarray(step, jnp.float32)
            keep = jnp.minimum(self.decay, (1.0 + t) / (10.0 + t))
            return jax.tree.map(lambda a, p: a + (1.0 - keep) * (p - a), average, params)

        return ParamView(
            init=lambda params: jax.tree.map(jnp.copy, params),
            apply=lambda params, average: params,
            update=update,
            evaluate=lambda params, average: average,
        )


@dataclass(frozen=True, kw_only=True)
class Chain(View):
    """Several views, the first nearest to the stored parameters."""

    views: tuple[View, ...]

    def build(self) -> ParamView:
        return chain(*(view.build() for view in self.views))


def chain(*views: ParamView) -> ParamView:
    """The composition: each view takes the effective parameters of the one before as its stored ones.

    The state is the tuple of theirs; of one view, its own; of none, `()`.
    """
    if not views:
        return IDENTITY
    if len(views) == 1:
        return views[0]

    def init(params):
        states = []
        for view in views:
            states.append(view.init(params))
            params = view.apply(params, states[-1])
        return tuple(states)

    def apply(params, states):
        for view, state in zip(views, states, strict=True):
            params = view.apply(params, state)
        return params

    def update(states, params, step):
        new = []
        for view, state in zip(views, states, strict=True):
            new.append(view.update(state, params, step))
            params = view.apply(params, new[-1])
        return tuple(new)

    def evaluate(params, states):
        for view, state in zip(views, states, strict=True):
            params = view.evaluate(params, state)
        return params

    return ParamView(init=init, apply=apply, update=update, evaluate=evaluate)
