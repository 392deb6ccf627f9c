"""Quantization-aware training in one file: symmetric int4 weights with a learned scale for each output channel (LSQ).

slmjax train tests/design/int4_weights.py --runtime.workdir runs/int4
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.optim.matrices import matrix
from slmjax.types import Group, ParamView
from slmjax.views import View, selected, stateless

LOW, HIGH = -8, 7


def fake_quant(w, scale):
    """s round(w / s), 16 steps. With v = w / s the gradient in s is round(v) - v inside, LOW or HIGH outside; in w it
    is 1 inside. Esser et al. 2020, arXiv:1902.08153."""
    v = jnp.clip(w / scale, LOW, HIGH)
    return scale * (v + jax.lax.stop_gradient(jnp.round(v) - v))


@dataclass(frozen=True, kw_only=True)
class Int4Weights(View):
    """The model computes with int4 weights; the optimizer keeps w, and the logarithm of a scale for each channel."""

    patterns: tuple[str, ...] = ("layers/attn/[qkvo]", "layers/mlp/*")
    rate: float = 0.3
    """Of the scales, as a factor on the learning rate"""

    def build(self, axes) -> ParamView:
        chosen = selected(axes, self.patterns)
        summed = {path: matrix(a).rows for path, a in chosen.items()}  # the dimensions that a product sums over
        kept = {path: tuple(n for d, n in enumerate(a) if d not in summed[path]) for path, a in chosen.items()}

        def scales(params, key):
            means = {path: jnp.mean(jnp.abs(tree.flatten(params)[path]), rows) for path, rows in summed.items()}
            return tree.unflatten({path: jnp.log(2 * mean / HIGH**0.5 + 1e-8) for path, mean in means.items()})

        def effective(params, own):
            logs = {path: jnp.expand_dims(x, summed[path]) for path, x in tree.flatten(own).items()}
            return tree.map_with_path(lambda path, w: fake_quant(w, jnp.exp(logs[path])) if path in logs else w, params)

        groups = dict.fromkeys(chosen, Group(rate=self.rate, weight_decay=0.0))
        return stateless(effective, own=scales, axes=tree.unflatten(kept), groups=groups)


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="int4", view=Int4Weights())
