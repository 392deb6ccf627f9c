"""A scaling law on GPUs: Llamas of 20 million to 1 billion parameters on FineWeb-Edu, and one that is predicted.

    slmjax sweep plan experiments/scaling/chinchilla_h100.py --out runs/chinchilla-h100 --dry-run
    slmjax launch slurm runs/chinchilla-h100 --tasks 8 --gpus 1 --time 12:00:00

Five sizes, three lengths of each: the longer ones go on from checkpoints of the shorter ones before their decay (WSD),
so that the stable phase is trained once. The recipe scales, since that is what made a forecast over 300 times the
compute hold (Marin's Delphi): CompleteP carries learning rate, initial values and weight decay from the base of 20
million parameters to every width and depth. `mup_transfer.py` is the check; run it with this base first. 2.7e20 FLOPs,
8 days of one H100 at 40% of 990 TFLOP/s, and 3.4e20 for the held-out run. Written for GPUs, never run.
"""

from dataclasses import replace
from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.decoder import Decoder
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.models.parametrisation import CompleteP
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import WSD
from slmjax.sweeps.cells import Cell, Sweep
from slmjax.sweeps.making import horizons

RECIPE = Path(__file__).resolve().parents[2] / "data/recipes/fineweb_edu.py"
VOCAB, LENGTH, BATCH = 32768, 2048, 128
SIZES = ((256, 6), (512, 8), (768, 12), (1024, 16), (1536, 24))
"""(width, layers)"""
HELD_OUT = (2048, 32)
TOKENS = (10, 20, 40)
"""A parameter"""


def plain(width: int, layers: int) -> Decoder:
    heads = width // 64
    return llama(
        layers=layers, width=width, heads=heads, kv_heads=heads // 2, hidden=11 * width // 4, vocab=VOCAB,
        context=LENGTH, tied=False,
    )  # fmt: skip


def experiment(width: int, layers: int) -> Experiment:
    return Experiment(
        name=f"chinchilla-h100-{width}",
        model=CompleteP(base=plain(*SIZES[0])).model(plain(width, layers)),
        data=PackedText(train=(Part(source=str(RECIPE)),), length=LENGTH, batch=BATCH),
        schedule=WSD(peak_lr=4e-3, warmup_steps=200, decay_fraction=0.2),
        optimizer=AdamW(b2=0.95, weight_decay=0.1),
        steps=1000,
        evaluation=Evaluation(every=1_000_000, batches=64),
    )


def steps(width: int, layers: int, ratio: float) -> int:
    """For `ratio` tokens a parameter."""
    return round(ratio * parameter_count(plain(width, layers)) / (LENGTH * BATCH))


def sweep() -> Sweep:
    cells = [cell for size in SIZES for cell in horizons(experiment(*size), [steps(*size, r) for r in TOKENS])]
    largest = replace(experiment(*HELD_OUT), steps=steps(*HELD_OUT, 20))
    return Sweep(name="chinchilla-h100", cells=tuple(cells), held_out=Cell(experiment=largest))
