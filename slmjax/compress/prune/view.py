"""Views that prune weights while a model is trained, or keep pruned ones at zero. Masks are part of the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.compress.prune.layout import prunable
from slmjax.compress.prune.masks import Count, PerLayer, Scope, check_sparsity
from slmjax.errors import UserError
from slmjax.types import Group, Params, ParamView
from slmjax.views import View


@dataclass(frozen=True, kw_only=True)
class Cubic:
    """Sparsity that rises fast at first and slowly at the end, in `times` rises that are `every` steps apart:

        s_t = final + (initial - final) (1 - (t - start) / (times * every))^3

    The forward pass of step `start` is the first with sparsity `initial`, that of `end` the first with `final`.

    References:
        Zhu and Gupta 2017, arXiv:1710.01878, equation 1
    """

    final: float = 0.5
    initial: float = 0.0
    start: int = 0
    """Step, from 0"""
    every: int = 100
    """Steps"""
    times: int = 10

    def __post_init__(self):
        for name in ("final", "initial"):
            check_sparsity(f"schedule.{name}", getattr(self, name))
        if self.initial > self.final:
            raise UserError(
                f"schedule.initial is {self.initial}, above schedule.final, {self.final}; sparsity only rises"
            )
        for name, least in (("start", 0), ("every", 1), ("times", 1)):
            if getattr(self, name) < least:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; expected {least} or more")

    @property
    def end(self) -> int:
        """The first step with the final sparsity."""
        return self.start + self.every * self.times

    def after(self, rises: int) -> float:
        """The sparsity after so many rises, 0 to `times`."""
        return self.final + (self.initial - self.final) * (1 - rises / self.times) ** 3

    def rises(self, step: Any) -> Any:
        """How many rises there have been in the forward pass of a step, int32 []; -1 before `start`."""
        return jnp.clip((jnp.asarray(step, jnp.int32) - self.start) // self.every, -1, self.times)

    def count(self, rises: Any) -> Count:
        """How many entries of a set are pruned after so many rises, an int32 array []. The numbers are computed ahead,
        in float64: in float32 a large matrix would not get the exact one."""

        def of(entries: int) -> Any:
            return jnp.asarray([round(self.after(i) * entries) for i in range(self.times + 1)], jnp.int32)[rises]

        return of

    def check(self, steps: int) -> None:
        """
        Raises:
            UserError: a run of this many steps would not train with the final sparsity.
        """
        if self.end >= steps:
            raise UserError(
                f"view.schedule: the final sparsity is reached at step {self.end} (start + times * every), but the run "
                f"has {steps} steps; lower view.schedule.times or view.schedule.every"
            )


def masked(params: Params, masks: Any) -> Params:
    """The parameters with zeros where a mask (a tree of some of the paths) is False; a weight there has no gradient."""
    flat = tree.flatten(masks)
    return tree.map_with_path(lambda path, w: jnp.where(flat[path], w, 0) if path in flat else w, params)


def _of(params: Params, paths: Mapping[str, Any]) -> dict[str, Any]:
    return {path: w for path, w in tree.flatten(params).items() if path in paths}


def _all_kept(params: Params, paths: Mapping[str, Any]) -> Any:
    return tree.unflatten({path: jnp.ones(w.shape, bool) for path, w in _of(params, paths).items()})


@dataclass(frozen=True, kw_only=True)
class Prune(View):
    """Gradual magnitude pruning: the smallest weights become zero and stay zero, more of them at each rise of the
    schedule, and none after the last.

    References:
        Zhu and Gupta 2017, arXiv:1710.01878
    """

    schedule: Cubic = Cubic()
    scope: Scope = PerLayer()  # noqa: RUF009
    """Which weights are compared with one another"""
    patterns: tuple[str, ...] = ()
    """Globs of paths, such as `layers*/mlp/*`; empty: every matrix of the layers"""

    def __post_init__(self):
        self.scope.check(self.schedule.final)

    def over(self, steps: int) -> View:
        self.schedule.check(steps)
        return self

    def build(self, axes: Any) -> ParamView:
        chosen, schedule = prunable(axes, self.patterns), self.schedule

        def raised(params: Params, masks: Any, rises: Any) -> Any:
            kept = tree.flatten(masks)
            # A weight that is pruned already comes first, so that it stays pruned whatever its stored value.
            scores = {path: jnp.where(kept[path], jnp.abs(w), -1.0) for path, w in _of(params, chosen).items()}
            return tree.unflatten(self.scope.keep(scores, chosen, schedule.count(rises)))

        def init(params: Params, key: Any) -> tuple[Params, Any]:
            masks, rises = _all_kept(params, chosen), schedule.rises(0)
            return {}, {"masks": raised(params, masks, rises) if schedule.start == 0 else masks, "rises": rises}

        def update(state: Any, params: Params, own: Params, step: Any) -> Any:
            # A step that is skipped does not update the state: the next one then makes up for it.
            rises = schedule.rises(step + 1)
            masks = jax.lax.cond(
                rises > state["rises"], raised, lambda params, masks, rises: masks, params, state["masks"], rises
            )
            return {"masks": masks, "rises": rises}

        def apply(params: Params, own: Params, state: Any) -> Params:
            return masked(params, state["masks"])

        return ParamView(init=init, apply=apply, update=update, evaluate=apply)


@dataclass(frozen=True, kw_only=True)
class Movement(View):
    """Movement pruning: a weight is kept if training moves it away from zero. Each weight has a score S, a parameter of
    its own that starts at 0 and has the gradient G * w, where G is that of the masked weight; the highest are kept.
    Under plain gradient descent S is -sum(w dL/dw) times the learning rate. A pruned weight has no gradient, but its
    score has, so that it can return.

    The masks are computed again every `schedule.every` steps, after the last rise too; 1 is as in the paper.

    References:
        Sanh, Wolf and Rush 2020, arXiv:2005.07683, section 4
    """

    schedule: Cubic = Cubic()
    scope: Scope = PerLayer()  # noqa: RUF009
    """Which scores are compared with one another"""
    patterns: tuple[str, ...] = ()
    """Globs of paths, such as `layers*/mlp/*`; empty: every matrix of the layers"""
    scores_rate: float = 1.0
    """Learning rate of the scores, as a factor on that of the weights"""

    def __post_init__(self):
        self.scope.check(self.schedule.final)
        if self.schedule.start == 0 and self.schedule.initial > 0:
            raise UserError(
                f"view.schedule.initial is {self.schedule.initial} from step 0 on, when all scores of Movement are "
                "still 0; set it to 0, or begin at a later view.schedule.start"
            )

    def over(self, steps: int) -> View:
        self.schedule.check(steps)
        return self

    def build(self, axes: Any) -> ParamView:
        chosen, schedule = prunable(axes, self.patterns), self.schedule

        def init(params: Params, key: Any) -> tuple[Params, Any]:
            scores = {path: jnp.zeros_like(w) for path, w in _of(params, chosen).items()}
            return tree.unflatten(scores), {"masks": _all_kept(params, chosen), "rises": schedule.rises(0)}

        def computed(own: Params, masks: Any, rises: Any) -> Any:
            return tree.unflatten(self.scope.keep(tree.flatten(own), chosen, schedule.count(rises)))

        def update(state: Any, params: Params, own: Params, step: Any) -> Any:
            rises, since = schedule.rises(step + 1), step + 1 - schedule.start
            due = (rises > state["rises"]) | ((since >= 0) & (since % schedule.every == 0))
            masks = jax.lax.cond(due, computed, lambda own, masks, rises: masks, own, state["masks"], rises)
            return {"masks": masks, "rises": rises}

        def apply(params: Params, own: Params, state: Any) -> Params:
            scores = tree.flatten(own)

            def straight_through(path: str, zeroed: Any, w: Any) -> Any:
                if path not in scores:
                    return zeroed
                nothing = scores[path] - jax.lax.stop_gradient(scores[path])  # 0, with a gradient
                return zeroed + nothing * jax.lax.stop_gradient(w)

            return tree.map_with_path(straight_through, masked(params, state["masks"]), params)

        return ParamView(
            init=init,
            apply=apply,
            update=update,
            evaluate=lambda params, own, state: masked(params, state["masks"]),
            axes=tree.unflatten(dict(chosen)),
            groups=dict.fromkeys(chosen, Group(rate=self.scores_rate, weight_decay=0.0)),
        )


@dataclass(frozen=True, kw_only=True)
class KeepZeros(View):
    """Weights that are zero when training starts stay zero: to train a pruned model further."""

    patterns: tuple[str, ...] = ()
    """Globs of paths, such as `layers*/mlp/*`; empty: every matrix of the layers"""

    def build(self, axes: Any) -> ParamView:
        chosen = prunable(axes, self.patterns)

        def init(params: Params, key: Any) -> tuple[Params, Any]:
            return {}, {"masks": tree.unflatten({path: w != 0 for path, w in _of(params, chosen).items()})}

        def apply(params: Params, own: Params, state: Any) -> Params:
            return masked(params, state["masks"])

        return ParamView(init=init, apply=apply, update=lambda state, params, own, step: state, evaluate=apply)
