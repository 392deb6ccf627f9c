"""The quickstart's model with 2-bit weights: full precision first, then quantization-aware training while the learning
rate decays (arXiv:2509.22935). The matrices of the layers take four values a channel, with a learned scale (SEQ,
ParetoQ, arXiv:2502.02631); the embedding stays in full precision.

    slmjax train experiments/quantize/two_bits.py --runtime.workdir runs/two-bits
    slmjax export runs/two-bits --format gguf --out exports/two-bits.gguf

The budget law gives the share of steps in quantization; it was fitted for 100 and more tokens a byte of the model. A
short run like this one has fewer, so a quarter of the steps is the least.
"""

from dataclasses import replace

from slmjax.compress.quant.budget import fraction
from slmjax.compress.quant.learned import SEQ
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.config import Experiment
from slmjax.experiment_file import load_experiment
from slmjax.models.flops import parameter_count
from slmjax.optim.schedules import WSD
from slmjax.train.guard import Skip


def experiment() -> Experiment:
    base, _ = load_experiment("experiments/pretrain/quickstart.py")
    tokens = base.steps * base.data.batch * base.data.length
    share = max(0.25, fraction(tokens, parameter_count(base.model), bits=2))
    return replace(
        base,
        name="two-bits",
        schedule=WSD(peak_lr=2e-3, warmup_steps=30, decay_fraction=share),
        guard=Skip(sigma=None),  # the loss may rise when rounding begins, which is no spike
        view=Quantize(rules=(Rule(quantizer=SEQ(levels=4)),), share=share),
    )
