"""`Quantize`, the view of quantization-aware training: the model computes with rounded weights, the optimizer keeps
weights of full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.axes import APART
from slmjax.compress.quant.blocks import Axes, Blocks, sides
from slmjax.compress.quant.grids import Codes, Grid, decoded
from slmjax.compress.quant.quantizers import Quantizer
from slmjax.errors import UserError
from slmjax.optim.matrices import matrix
from slmjax.types import Group, Params, ParamView
from slmjax.views import View


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A quantizer, and the parameters that it rounds."""

    quantizer: Quantizer
    patterns: tuple[str, ...] = ()
    """Globs of paths, such as `layers*/mlp/*`, `embed/table`; empty: every matrix of the layers"""


class Packed(NamedTuple):
    """A weight as codes, and what they mean."""

    codes: Codes
    grid: Grid
    blocks: Blocks
    axes: Axes

    def values(self) -> Any:
        """The weight, float32, as numpy: bit for bit what the model computes with."""
        return decoded(self.codes, self.grid, self.blocks)


def with_values(params: Params, packed: Mapping[str, Packed]) -> Params:
    """The parameters, those quantized replaced by the values of their codes (float32)."""
    return tree.map_with_path(lambda path, x: jnp.asarray(packed[path].values()) if path in packed else x, params)


def chosen(axes: Any, rules: tuple[Rule, ...]) -> dict[str, Quantizer]:
    """{path: its quantizer}: that of the first rule with a matching pattern.

    Raises:
        UserError: a pattern matches no parameter, or one that is not a matrix.
    """
    flat = tree.flatten(axes, is_leaf=tree.is_axes)
    out: dict[str, Quantizer] = {}
    for rule in rules:
        if rule.patterns:
            mask = tree.flatten(tree.mask(tree.unflatten(dict.fromkeys(flat, False)), rule.patterns))
            paths = [path for path, match in mask.items() if match]
        else:
            paths = [path for path, a in flat.items() if of_layers(path, a)]
        out |= {path: rule.quantizer for path in paths if path not in out}
    for path in out:
        sides(flat[path], path)
    return {path: out[path] for path in flat if path in out}


def of_layers(path: str, axes: Axes) -> bool:
    """Whether a parameter is a matrix inside the layers."""
    return path.startswith("layers") and matrix(axes, path) is not None and not any(name in APART for name in axes)


@dataclass(frozen=True, kw_only=True)
class Quantize(View):
    """Quantization-aware training (fake quantization).

    Each rule takes the parameters that no earlier one has. Norms and biases stay as they are; embeddings and the output
    table are rounded if a pattern names them. Learned scales are parameters of their own, without weight decay.
    """

    rules: tuple[Rule, ...]
    share: float = 1.0
    """The share of the steps, at the end of the run, in which weights are rounded; full precision before"""
    start: int | None = None
    """The step from which weights are rounded; None: as `share` says. The scales begin from the weights of that step"""
    scale_rate: float = 1.0
    """Learning rate of learned scales, as a factor on that of the weights"""

    def __post_init__(self):
        if not self.rules:
            raise UserError("view.rules is empty; give at least one Rule(quantizer=...)")
        if not 0 < self.share <= 1:
            raise UserError(f"view.share is {self.share}; expected more than 0 and at most 1, such as 0.25")
        if self.start is not None and self.start < 0:
            raise UserError(f"view.start is {self.start}; expected a step, 0 or more")

    def over(self, steps: int) -> Quantize:
        start = steps - max(1, round(steps * self.share)) if self.start is None else self.start
        if start >= steps:
            raise UserError(
                f"view.start is {start}, but the run has {steps} steps: no weight would ever be rounded; lower it"
            )
        return replace(self, start=start)

    def build(self, axes: Any) -> ParamView:
        if self.start is None:
            if self.share < 1:
                raise UserError(f"view.share is {self.share} of an unknown number of steps; call over(steps) first")
            return replace(self, start=0).build(axes)
        start = self.start
        flat = tree.flatten(axes, is_leaf=tree.is_axes)
        quantizers = chosen(axes, self.rules)
        if not quantizers:
            raise UserError("view.rules: the model has no matrix in its layers; name parameters with patterns")
        learned = [path for path, quantizer in quantizers.items() if quantizer.learned]

        def blocks(path: str, w: Any) -> Blocks:
            return quantizers[path].granularity.cut(tuple(w.shape), flat[path], path)

        def references(params: Params) -> dict[str, Any]:
            weights, found = tree.flatten(params), {}
            for path in learned:
                cut = blocks(path, weights[path])
                blocked = weights[path].astype(jnp.float32).reshape(cut.blocked)
                found[path] = quantizers[path].reference(blocked, cut)
            return found

        def init(params: Params, key: Any) -> tuple[Params, Any]:
            found = references(params)
            own = tree.unflatten({path: jnp.zeros_like(x) for path, x in found.items()})
            return own, {"begun": jnp.asarray(start == 0), "references": found}

        def arguments(path: str, w: Any, own: Mapping[str, Any], state: Any) -> tuple[Any, ...]:
            return w, blocks(path, w), own.get(path), state["references"].get(path)

        def fake(weights: Mapping[str, Any], own: Params, state: Any) -> dict[str, Any]:
            owned = tree.flatten(own)
            return {path: quantizers[path].fake(*arguments(path, w, owned, state)) for path, w in weights.items()}

        def apply(params: Params, own: Params, state: Any) -> Params:
            weights = {path: w for path, w in tree.flatten(params).items() if path in quantizers}
            if start == 0:
                new = fake(weights, own, state)
            else:
                new = jax.lax.cond(state["begun"], fake, lambda weights, own, state: weights, weights, own, state)
            return tree.map_with_path(lambda path, w: new.get(path, w), params)

        def update(state: Any, params: Params, own: Params, step: Any) -> Any:
            if start == 0:
                return state
            now = step + 1 == start
            found = jax.lax.cond(now, references, lambda params: state["references"], params)
            return {"begun": state["begun"] | now, "references": found}

        def pack(params: Params, own: Params, state: Any) -> dict[str, Packed]:
            if not bool(state["begun"]):
                return {}
            owned, packed = tree.flatten(own), {}
            for path, w in tree.flatten(params).items():
                if path in quantizers:
                    codes = quantizers[path].pack(*arguments(path, w, owned, state))
                    packed[path] = Packed(codes, quantizers[path].grid, blocks(path, w), flat[path])
            return packed

        return ParamView(
            init=init,
            apply=apply,
            update=update,
            evaluate=apply,
            axes=tree.unflatten({path: quantizers[path].granularity.axes(flat[path], path) for path in learned}),
            groups=dict.fromkeys(learned, Group(rate=self.scale_rate, weight_decay=0.0)),
            pack=pack,
        )


def quantizes(view: Any) -> list[Quantize]:
    """The `Quantize` in a view, however deep."""
    if isinstance(view, Quantize):
        return [view]
    if isinstance(view, tuple):
        return [found for part in view for found in quantizes(part)]
    if is_dataclass(view):
        return [found for field in fields(view) for found in quantizes(getattr(view, field.name))]
    return []
