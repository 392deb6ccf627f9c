"""What text that is read again is worth: a tenth of the English classics for up to 10 epochs, beside as many bytes that
are read once.

    slmjax sweep plan experiments/scaling/repetition.py --out runs/repetition
    slmjax sweep run runs/repetition
    slmjax fit runs/repetition/results.tsv

The law has D' = U + U R* (1 - exp(-R / R*)) tokens in place of D, where U tokens are different and R = D / U - 1 times
they are read again (Muennighoff et al. 2023, arXiv:2305.16264). Their R* = 15.4 is weakly identified (the optimum of
their own criterion is 95), so look at the profile that `slmjax fit` draws, not at the number.

The tenth and the whole are of one distribution, and all runs are evaluated on the same documents: a recipe holds out
the documents whose hash is lowest, so those of `validation=0.1` are among those of `validation=0.9`. The weight decay
is 1.0, ten times the usual one, since repeated text wants more (arXiv:2509.14786). 24 runs, 2.2e13 FLOPs.
"""

from dataclasses import replace
from typing import Any

from chinchilla_cpu import SHAPE, adapted, base

from slmjax.data.spec import Part
from slmjax.optim.recipes import AdamW
from slmjax.sweeps.cells import Cell, Sweep

SIZES = (1e4, 2.5e4, 6.3e4)
STEPS = (1000, 2000, 4000, 8000)
"""Of 1024 bytes; a tenth of the documents has 776,000 bytes"""


def sweep() -> Sweep:
    texts: Any = base().data
    (whole,) = texts.train
    tenth = Part(source=replace(whole.source, name="english_bytes_tenth", validation=0.9))
    cells = []
    for size in SIZES:
        for steps in STEPS:
            for text, part in (("once", whole), ("again", tenth)):
                data = replace(texts, train=(part,), validation=(whole,))
                made = replace(base(), name="repetition", model=SHAPE(size), data=data, steps=steps)
                made = replace(adapted(made), optimizer=AdamW(b2=0.99, weight_decay=1.0))
                cells.append(Cell(experiment=made, tags={"text": text, "size": size}))
    return Sweep(name="repetition", cells=tuple(cells))
