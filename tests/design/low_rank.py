"""LoRA in one file: low-rank updates of the matrices of a frozen model. Hu et al. 2021, arXiv:2106.09685.

slmjax train experiments/pretrain/quickstart.py --runtime.workdir runs/base
slmjax train tests/design/low_rank.py --start.model runs/base --runtime.workdir runs/lora
"""

from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp

from slmjax import tree
from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.optim.recipes import matrix
from slmjax.start import FromModel
from slmjax.types import ParamView
from slmjax.views import View, selected, stateless


@dataclass(frozen=True, kw_only=True)
class LoRA(View):
    """w + alpha / rank * down up, with down [inputs, rank] and up [rank, outputs] for each layer's matrix w."""

    patterns: tuple[str, ...] = ("layers/attn/[qv]",)
    rank: int = 4
    alpha: float = 8.0

    def build(self, axes) -> ParamView:
        shapes = {path: matrix(a) for path, a in selected(axes, self.patterns).items()}

        def adapters(params, key):
            added = {}
            for i, (path, m) in enumerate(shapes.items()):
                shape = tree.flatten(params)[path].shape
                inputs, outputs = (prod(shape[d] for d in side) for side in m)
                draw = jax.random.normal(jax.random.fold_in(key, i), (shape[0], inputs, self.rank))
                added |= {f"{path}/down": draw / inputs**0.5, f"{path}/up": jnp.zeros((shape[0], self.rank, outputs))}
            return tree.unflatten(added)

        def effective(params, own):
            of = tree.flatten(own)

            def add(path, w):
                if path not in shapes:
                    return w
                return w + self.alpha / self.rank * (of[f"{path}/down"] @ of[f"{path}/up"]).reshape(w.shape)

            return tree.map_with_path(add, params)

        sides = {"down": ("layers", "embed", None), "up": ("layers", None, "embed")}
        added = tree.unflatten({f"{path}/{side}": a for path in shapes for side, a in sides.items()})
        return stateless(effective, own=adapters, axes=added, frozen=frozenset(selected(axes, ("*",))))


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    return replace(base, name="lora", view=LoRA(), start=FromModel(model="runs/base"))
