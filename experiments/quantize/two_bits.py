"""The quickstart's model with 2-bit weights: full precision first, then quantization-aware training while the learning
rate decays (arXiv:2509.22935). The matrices of the layers take four values a channel, with a learned scale (SEQ,
ParetoQ, arXiv:2502.02631); the embedding stays in full precision.

    slmjax train experiments/quantize/two_bits.py --runtime.workdir runs/two-bits
    slmjax export runs/two-bits --format gguf --out exports/two-bits.gguf

Costs what the quickstart costs, and 2 to 5% more a step. Expected: 0.004 nats a token above the quickstart's 4.7.

The budget law gives the share of the steps in quantization where it was fitted, from 100 training tokens for each byte
of the quantized model on. This run has 0.7; there the share is a quarter.

    slmjax train experiments/quantize/two_bits.py:from_scratch --runtime.workdir runs/two-bits-from-scratch

rounds from the first step, which the paper finds to cost more than a share at the end; not measured here.
"""

from dataclasses import replace

from slmjax.compress.quant.budget import share
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
    part = share(tokens, parameter_count(base.model), bits=2)
    return replace(
        base,
        name="two-bits",
        schedule=WSD(peak_lr=2e-3, warmup_steps=30, decay_fraction=part),
        guard=Skip(sigma=None),  # the loss may rise when rounding begins, which is no spike
        view=Quantize(rules=(Rule(quantizer=SEQ(levels=4)),), share=part),
    )


def from_scratch() -> Experiment:
    """Rounded weights from the first step on; the rest is the same."""
    later = experiment()
    rules = (Rule(quantizer=SEQ(levels=4)),)
    return replace(later, name="two-bits-from-scratch", view=Quantize(rules=rules, share=1.0))
