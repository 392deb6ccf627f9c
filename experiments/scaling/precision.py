"""What bits cost in parameters: models of three sizes, trained for three lengths with weights of 2, 3, 4, 8 and 16
bits.

    slmjax sweep plan experiments/scaling/precision.py --out runs/precision
    slmjax sweep run runs/precision
    slmjax sweep report runs/precision
    slmjax fit runs/precision/results.tsv --predict params=2.5e5,tokens=3e6,bits=3

The law has N (1 - exp(-bits / gamma)) parameters in place of N (Kumar et al. 2024, arXiv:2411.04330, who found gamma
2.67 for weights). Matrices of the layers are rounded from the first step on, with the step that the largest weight of
each output asks for (absmax); embeddings and norms are not. The held-out run is larger and longer than all others, in 3
bits, and is predicted before it runs. 45 runs and the held-out one, 2.3e13 FLOPs. Planned, not run yet in this form.

With learned steps (LSQ) in their place it was run, and failed: 8 bits lost 0.1 nats, gamma ended at its bound, and the
held-out loss, 2.02, was predicted as 1.70. A learned step of 8 bits is some 0.003 wide, and Adam moves it by up to the
learning rate, 0.011, a step. At 40 thousand parameters and 400 steps, not rounded 1.965, LSQ ends at 2.104 in 8 bits
and 2.381 in 3, absmax at 1.957 and 2.043.
"""

from dataclasses import replace

from chinchilla_cpu import SHAPE, adapted, base

from slmjax.compress.quant.uniform import Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.config import Experiment
from slmjax.sweeps.cells import Cell, Sweep
from slmjax.train.guard import Skip
from slmjax.views import Identity

SIZES, STEPS = (1.6e4, 4e4, 1e5), (400, 900, 2000)
"""Parameters, and steps of 1024 bytes at the batch of the base, which is changed"""
BITS = (2, 3, 4, 8, 16)
"""16: not rounded"""


def cell(size: float, steps: int, bits: int) -> Cell:
    made: Experiment = adapted(replace(base(), name="precision", model=SHAPE(size), steps=steps))
    view = Identity() if bits == 16 else Quantize(rules=(Rule(quantizer=Symmetric(bits=bits)),))
    # A spike at the start of rounded training is part of what the bits cost.
    return Cell(experiment=replace(made, view=view, guard=Skip(sigma=None)), tags={"bits": bits, "size": size})


def sweep() -> Sweep:
    cells = tuple(cell(size, steps, bits) for size in SIZES for steps in STEPS for bits in BITS)
    return Sweep(name="precision", cells=cells, held_out=cell(2.5e5, 3000, 3))
