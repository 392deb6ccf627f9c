"""Quantization-aware training in one file: symmetric int4 weights with a learned scale for each output channel (LSQ).

slmjax train tests/design/int4_weights.py --runtime.workdir runs/int4
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.optim.recipes import matrix
from slmjax.types import Group, ParamView
from slmjax.views import View, selected, stateless

LOW, HIGH = -8, 7


def fake_quant(w, scale):
    """s round(w / s), 16 steps. With v = w / s the gradient in s is round(v) - v inside, LOW or HIGH outside; in
    w, 1 inside. Esser et al. 2020, arXiv:1902.08153."""
    v = jnp.clip(w / scale, LOW, HIGH)
    return scale * (v + jax.lax.stop_gradient(jnp.round(v) - v))


@dataclass(frozen=True, kw_only=True)
class Int4Weights(View):
    """The model computes with int4 weights; the optimizer keeps w, and a scale for each output channel."""

    patterns: tuple[str, ...] = ("layers/attn/[qkvo]", "layers/mlp/*")
    rate: float = 0.1
    """Of the scales, as a factor on the learning rate"""

    def build(self, axes) -> ParamView:
        chosen = selected(axes, self.patterns)
        inputs = {path: matrix(a).rows for path, a in chosen.items()}  # the dimensions that a product sums over

        def scales(params, key):
            of_model = tree.flatten(params)
            means = {path: jnp.mean(jnp.abs(of_model[path]), rows, keepdims=True) for path, rows in inputs.items()}
            return tree.unflatten({path: 2 * mean / HIGH**0.5 for path, mean in means.items()})

        def effective(params, own):
            of = tree.flatten(own)
            return tree.map_with_path(lambda path, w: fake_quant(w, of[path]) if path in of else w, params)

        whole = {path: (None,) * len(a) for path, a in chosen.items()}  # scales are small: replicated
        groups = dict.fromkeys(whole, Group(rate=self.rate))
        return stateless(effective, own=scales, axes=tree.unflatten(whole), groups=groups)


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="int4", view=Int4Weights())
