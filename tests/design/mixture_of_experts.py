"""A mixture of experts in one file: each token is computed by the experts that a router prefers for it.

slmjax train tests/design/mixture_of_experts.py --runtime.workdir runs/experts
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.nn.parts import FeedForward


@dataclass(frozen=True, kw_only=True)
class Experts(FeedForward):
    """The `top` likeliest of `experts` SwiGLU layers, weighted by the router. Shazeer et al. 2017, arXiv:1701.06538.

    Every expert computes every token, and those not chosen count 0: exact, and meant for few small experts.
    """

    experts: int = 4
    top: int = 2
    hidden: int = 352
    balance: float = 0.01
    auxiliary = ("balance",)

    def active(self, name):
        return 1.0 if name == "router" else self.top / self.experts

    def __call__(self, layer, x, flow):
        d, e, f = x.shape[-1], self.experts, self.hidden
        logits = layer.linear("router", "btd,de->bte", x, (d, e), ("embed", None))
        p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        chosen = p >= jax.lax.top_k(p, self.top)[0][..., -1:]
        share = jnp.where(chosen, p, 0.0)
        share = layer.cast(share / share.sum(-1, keepdims=True))
        into = ("btd,edf->btef", x, (e, d, f), ("experts", "embed", "mlp"))
        h = jax.nn.silu(layer.linear("gate", *into)) * layer.linear("up", *into) * share[..., None]
        y = layer.linear("down", "btef,efd->btd", h, (e, f, d), ("experts", "mlp", "embed"), residual=True)
        return y, flow.adding("balance", self.balance * self.imbalance(p, chosen, flow))

    def imbalance(self, p, chosen, flow):
        """[B, T, E] twice -> [B, T], of the document that a token is in: sum over experts of the share of tokens times
        the mean probability, 1 if all are alike. DeepSeek-V3, arXiv:2412.19437, equations 17 to 20."""
        ids = flow.mask.query_segments
        same = jnp.float32((ids[:, :, None] == ids[:, None, :]) & flow.real[:, None, :])  # [B, T, T]
        mean = same / jnp.maximum(same.sum(-1, keepdims=True), 1.0)
        return jnp.sum((mean @ jnp.float32(chosen)) * (mean @ p), axis=-1) * self.experts / self.top


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    (block,) = base.model.pattern
    return replace(base, name="experts", model=replace(base.model, pattern=(replace(block, mlp=Experts()),)))
