"""Optimizers: frozen dataclasses over optax.

Each clips the gradient by its global norm, turns it into a direction, adds decoupled weight decay and scales by the
learning rate: `params -= lr * (direction + weight_decay * params)`, as `torch.optim.AdamW` does. Norm gains and biases
are never decayed.

Layers are stacked on a leading axis and heads have an axis of their own; the logical axes define which dimensions form
one matrix, so that optimizers of matrices (Muon, Adafactor) treat each layer's matrix by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from jax.core import Tracer

from slmjax import tree
from slmjax.axes import STACKED
from slmjax.errors import UserError, is_number
from slmjax.optim.groups import with_own_decay, with_own_eps, with_own_rate, without
from slmjax.optim.matrices import (
    Axes,
    StepNorm,
    by_path,
    entrywise,
    inner_matrices,
    mask,
    matrices,
    matrix,
    orthogonal,
)
from slmjax.optim.schedules import Curve
from slmjax.traced import TRACED
from slmjax.types import Factors, Group, Optimizer

MEMORIES = ("b1", "b2", "momentum", "adam_b1", "adam_b2")
"""Fields of optimizers that give the share of a moving average that is kept at each step"""


def map_axes(f: Callable[[Axes], Any], axes: Any) -> Any:
    """`jax.tree.map` over a tree whose leaves are tuples of axis names."""
    return jax.tree.map(f, axes, is_leaf=tree.is_axes)


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(ABC):
    """What all optimizers share.

    Learning rates, weight decays, betas and epsilons may be arrays, traced ones too, so that `jax.vmap` can train
    several runs at once. Plain Python numbers are checked.
    """

    weight_decay: float = field(default=0.1, metadata=TRACED)
    """Decoupled: each step multiplies the decayed parameters by `1 - lr * weight_decay`"""
    no_decay: tuple[str, ...] = ()
    """Path patterns of parameters that are not decayed, in addition to gains and biases, e.g. `("embed/*",)`"""
    clip_norm: float | None = field(default=1.0, metadata=TRACED)
    """Gradients with a larger global norm are scaled down to this norm; None: never"""

    def __post_init__(self):
        if is_number(self.weight_decay) and self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        if is_number(self.clip_norm) and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm is {self.clip_norm}; it must be positive, or None")
        for name in MEMORIES:
            value = getattr(self, name, 0.0)
            if is_number(value) and not 0 <= value < 1:
                raise UserError(f"optimizer.{name} is {value}; it must be at least 0 and below 1")

    @abstractmethod
    def direction(self, axes: Any) -> optax.GradientTransformation:
        """Gradients -> the direction to descend along, before weight decay and learning rate."""

    def step_norms(self, axes: Any) -> Mapping[str, StepNorm]:
        """How far a step moves each matrix, by path: from it follows how its learning rate depends on the width.

        Raises:
            UserError: this is not known of the optimizer.
        """
        raise UserError(
            f"optimizer {type(self).__name__}: no rule is known for its learning rates at another width; use AdamW, "
            "ScheduleFreeAdamW, Lion or Muon, or a model without muP"
        )

    def decayed(self, axes: Any) -> Any:
        """A tree of bools: which parameters are decayed.

        Raises:
            UserError: a pattern of `no_decay` matches no parameter, or an axis of a parameter is unknown.
        """
        spared = mask(axes, self.no_decay)
        return tree.map_with_path(lambda path, spare, a: not spare and matrix(a, path) is not None, spared, axes)

    def descend(self, schedule: Curve, axes: Any, groups: Mapping[str, Group]) -> optax.GradientTransformation:
        """The optimizer without gradient clipping."""
        return optax.chain(
            *with_own_eps(groups),
            self.direction(axes),
            optax.add_decayed_weights(self.weight_decay, self.decayed(without(axes, groups))),
            *with_own_decay(axes, groups),
            *with_own_rate(groups),
            optax.scale_by_learning_rate(schedule),
        )

    def build(
        self, schedule: Curve, axes: Any, groups: Mapping[str, Group] = {}, factors: Mapping[str, Factors] = {}
    ) -> Optimizer:
        """The optimizer of parameters with these logical axes. Works sharded, and inside jit.

        Args:
            axes: logical axes of the trained parameters: `Model.axes`, or those that `train.stored.optimized` returns.
            groups: {path: `Group`} of the parameters that a view adds.
            factors: by path, of parameters of the model that train otherwise than the rest (`Initial.factors`); paths
                that are not trained are ignored.

        Raises:
            UserError: a pattern of `no_decay` matches no parameter, or an axis of a parameter is unknown.
        """
        tx = optax.chain(self.clip(), self.descend(schedule, axes, {**groups, **self._groups_of(axes, factors)}))
        return Optimizer(init=tx.init, update=tx.update, evaluate=lambda state, params: params)

    def _groups_of(self, axes: Any, factors: Mapping[str, Factors]) -> dict[str, Group]:
        """Factors as groups: a parameter that is decayed has the optimizer's weight decay times its factor."""
        if not factors:
            return {}
        decays = {path: self.weight_decay if yes else 0.0 for path, yes in tree.flatten(self.decayed(axes)).items()}
        return {
            path: Group(rate=f.rate, weight_decay=f.weight_decay * decays[path], eps=f.eps)
            for path, f in factors.items()
            if path in decays
        }

    def clip(self) -> optax.GradientTransformation:
        return optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay; betas as usual for language models.

    References:
        Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101
    """

    b1: float = field(default=0.9, metadata=TRACED)
    b2: float = field(default=0.95, metadata=TRACED)
    eps: float = field(default=1e-8, metadata=TRACED)

    def step_norms(self, axes: Any) -> Mapping[str, StepNorm]:
        return dict.fromkeys(matrices(axes), entrywise)

    def direction(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerSpec):
    """The sign of an interpolated momentum: half of Adam's state. Wants a learning rate 3 to 10 times smaller than
    AdamW's and a weight decay as many times larger.

    References:
        Chen et al. 2023, arXiv:2302.06675
    """

    weight_decay: float = 0.5
    b1: float = field(default=0.9, metadata=TRACED)
    b2: float = field(default=0.99, metadata=TRACED)

    def step_norms(self, axes: Any) -> Mapping[str, StepNorm]:
        return dict.fromkeys(matrices(axes), entrywise)

    def direction(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerSpec):
    """Orthogonalised momentum for the matrices inside the layers; AdamW for embeddings, unembedding, gains, biases and
    the taps of short convolutions.

    The momentum of each layer's matrix (heads flattened) is replaced by the nearest semi-orthogonal matrix, by
    `newton_schulz_steps` quintic iterations: its singular values become roughly 1. It is then scaled by
    `rms * sqrt(max(rows, columns))`, so that an entry moves by `rms * lr`, about what AdamW does: one learning rate and
    one weight decay serve both.

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982 (rms scaling)
    """

    momentum: float = field(default=0.95, metadata=TRACED)
    nesterov: bool = True
    newton_schulz_steps: int = 5
    rms: float = field(default=0.2, metadata=TRACED)
    adam_b1: float = field(default=0.9, metadata=TRACED)
    adam_b2: float = field(default=0.95, metadata=TRACED)
    adam_eps: float = field(default=1e-8, metadata=TRACED)
    not_muon: tuple[str, ...] = ()
    """Path patterns of matrices that are left to AdamW as well"""

    def step_norms(self, axes: Any) -> Mapping[str, StepNorm]:
        return dict.fromkeys(matrices(axes), entrywise) | dict.fromkeys(inner_matrices(axes, self.not_muon), orthogonal)

    def direction(self, axes: Any) -> optax.GradientTransformation:
        numbers = {
            path: optax.contrib.MuonDimensionNumbers(reduction_axis=m.rows, output_axis=m.columns)
            for path, m in inner_matrices(axes, self.not_muon).items()
        }
        muon = optax.contrib.muon(
            learning_rate=-1.0,  # optax multiplies by minus the learning rate: with -1 this is the direction alone
            beta=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.newton_schulz_steps,
            consistent_rms=self.rms,
            muon_weight_dimension_numbers=lambda params: tree.map_with_path(lambda path, _: numbers[path], params),
        )
        # Not the Adam of optax's Muon: that would use Nesterov's momentum too.
        adam = optax.scale_by_adam(b1=self.adam_b1, b2=self.adam_b2, eps=self.adam_eps)
        labels = tree.unflatten({path: "muon" if path in numbers else "adam" for path in by_path(axes)})
        return optax.partition({"muon": muon, "adam": adam}, labels)


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerSpec):
    """Second moments kept as a row and a column a matrix, relative step sizes: almost no optimizer memory.

    The learning rate is a fraction of each matrix's own root mean square: 1e-2 is usual. The weight decay is
    decoupled here too.

    References:
        Shazeer and Stern 2018, arXiv:1804.04235
    """

    weight_decay: float = 0.0
    decay_power: float = field(default=0.8, metadata=TRACED)
    """At step t the second moment keeps the share `1 - t**-decay_power` of its value"""
    update_clip: float = field(default=1.0, metadata=TRACED)
    """Largest root mean square of a matrix's update before scaling"""
    min_factored: int = 128
    """Matrices with a side shorter than this keep the full second moment"""

    def direction(self, axes: Any) -> optax.GradientTransformation:
        tx = optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_power, min_dim_size_to_factor=self.min_factored),
            optax.clip_by_block_rms(self.update_clip),
            optax.scale_by_param_block_rms(),
        )
        return per_matrix(tx, axes)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(AdamW):
    """AdamW whose averaging replaces the decay of the learning rate, so that a run can stop at any step.

    Gradients are taken at y = (1 - b1) z + b1 x, where z is AdamW without momentum and x the average of the z's
    weighted by lr^2. Training sees y; evaluation and export see x. The schedule is warm-up, then constant: decaying
    it too would average twice.

    References:
        Defazio et al. 2024, The Road Less Scheduled, arXiv:2405.15682
    """

    def __post_init__(self):
        super().__post_init__()
        if is_number(self.b1) and self.b1 == 0:
            raise UserError(
                "optimizer.b1 is 0; ScheduleFreeAdamW needs it above 0 to compute the average that it evaluates"
            )

    def descend(self, schedule: Curve, axes: Any, groups: Mapping[str, Group]) -> optax.GradientTransformation:
        with jax.ensure_compile_time_eval():
            rates = [schedule(np.int32(2**k)) for k in range(31)]
        concrete = not any(isinstance(rate, Tracer) for rate in rates)
        if concrete and float(rates[-1]) < 0.999 * max(map(float, rates)):
            raise UserError(
                "schedule decays, but optimizer ScheduleFreeAdamW averages instead of decaying; use "
                "schedule = Constant(peak_lr=..., warmup_steps=...)"
            )
        return optax.contrib.schedule_free(super().descend(schedule, axes, groups), schedule, b1=self.b1)

    def direction(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_rms(decay=self.b2, eps=self.eps, eps_in_sqrt=False, bias_correction=True)

    def build(
        self, schedule: Curve, axes: Any, groups: Mapping[str, Group] = {}, factors: Mapping[str, Factors] = {}
    ) -> Optimizer:
        built = super().build(schedule, axes, groups, factors)
        return built._replace(evaluate=lambda state, params: optax.contrib.schedule_free_eval_params(state[-1], params))


def per_matrix(tx: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`tx` applied as if the parameter of each layer (and of each expert) were a leaf of its own, with heads flattened
    into one side of its matrix.

    The state of a stacked parameter has the stacking axis first: the layers, or all experts of all layers.
    """

    def to_matrices(x, a):
        m = matrix(a)
        stacked = sum(name in STACKED for name in a)
        sides = x.shape[stacked:] if m is None else [math.prod(x.shape[i] for i in side) for side in m]
        return x.reshape(*([-1] if stacked else []), *sides)

    def flat(params):
        return jax.tree.map(to_matrices, params, axes)

    groups = map_axes(lambda a: "layers" if a[:1] and a[0] in STACKED else "single", axes)
    stacked = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    transforms = {"layers": stacked, "single": tx}
    both = optax.partition({group: transforms[group] for group in set(jax.tree.leaves(groups))}, groups)

    def init(params):
        return both.init(flat(params))

    def update(updates, state, params=None):
        out, state = both.update(flat(updates), state, flat(params))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), out, updates), state

    return optax.GradientTransformation(init, update)
