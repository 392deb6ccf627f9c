"""Little data: which weight decay, how many epochs and how many models do 776,000 bytes of text want?

    slmjax sweep plan experiments/scaling/data_limited.py --out runs/data-limited
    slmjax sweep run runs/data-limited
    slmjax sweep status runs/data-limited

A tenth of the English classics, for 2 and 6 epochs, with weight decays from the usual one to 30 times that:
Kim et al. 2025 (arXiv:2509.14786) find about 30 times the usual one best where data are scarce, and that an ensemble of
models with different seeds gains more than a larger model, most of which one model keeps that is distilled from it. The
three seeds of each cell are such an ensemble: experiments/distill/ensemble.py distills it. Runs of one length train
together, as one program. 24 runs, 1.9e13 FLOPs.
"""

from dataclasses import replace
from typing import Any

from chinchilla_cpu import SHAPE, adapted, base

from slmjax.data.spec import Part
from slmjax.optim.recipes import AdamW
from slmjax.sweeps.cells import Sweep
from slmjax.sweeps.making import grid, seeds

SIZE = 3.2e4
EPOCH = 758
"""Steps of 1024 bytes"""
WEIGHT_DECAYS = (0.1, 0.3, 1.0, 3.0)


def sweep() -> Sweep:
    texts: Any = base().data
    (whole,) = texts.train
    # Of the same distribution as what is held out: documents of the lowest hashes are in both validation splits.
    tenth = Part(source=replace(whole.source, name="english_bytes_tenth", validation=0.9))
    data = replace(texts, train=(tenth,), validation=(whole,))
    cells = []
    for epochs in (2, 6):
        made = replace(base(), name="data-limited", model=SHAPE(SIZE), data=data, steps=epochs * EPOCH)
        made = replace(adapted(made), optimizer=AdamW(b2=0.99))
        cells += seeds(grid(made, **{"optimizer.weight_decay": WEIGHT_DECAYS}), 3)
    return Sweep(name="data-limited", cells=tuple(cells))
