"""Quantization-aware training in one file: symmetric int4 weights, one scale a row, straight-through gradient.

slmjax train tests/design/int4_weights.py --runtime.workdir runs/int4
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.types import ParamView
from slmjax.views import View


@dataclass(frozen=True, kw_only=True)
class Int4Weights(View):
    """The model computes with round(w / s) * s in -8..7 steps; the optimizer keeps w, whose gradient goes through.

    Bengio et al. 2013, arXiv:1308.3432 (straight-through); Jacob et al. 2018, arXiv:1712.05877.
    """

    patterns: tuple[str, ...] = ("layers/attn/[qkvo]", "layers/mlp/*")

    def quantize(self, path, w):
        if not tree.matches(path, self.patterns):
            return w
        scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 7.5
        grid = scale * jnp.clip(jnp.round(w / jnp.maximum(scale, 1e-12)), -8, 7)
        return w + jax.lax.stop_gradient(grid - w)

    def build(self) -> ParamView:
        def effective(params, state):
            return tree.map_with_path(self.quantize, params)

        return ParamView(
            init=lambda params: (),
            apply=effective,
            update=lambda state, params, step: state,
            evaluate=effective,
        )


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="int4", view=Int4Weights())
