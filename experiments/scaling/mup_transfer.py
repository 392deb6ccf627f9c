"""Does a learning rate that is best for a model of width 32 and 2 layers stay the best for wider and deeper ones?

    slmjax verify mup experiments/scaling/mup_transfer.py --widths 32 64 128 256 --depths 2 8 --steps 100
    slmjax verify mup experiments/scaling/mup_transfer.py --widths 32 64 128 256 --depths 2 4 8 --steps 200

Five learning rates by factors of two around 0.016, under CompleteP and under the standard parametrisation (SP) as the
control. Each takes some 8 minutes of processor time; the second is the full grid. It does not pass: over the depth the
residual stream falls with a power of 0.53, which is what independent branches give, 0.5, and more than the tolerance of
0.45. All else is as below (docs/recipes.md).

Expected of the first: under CompleteP all activations are flat within a power of 0.45 (the steepest is the stream over
depth, -0.38) and the best learning rate is 0.016 or 0.032 at every size. Under SP activations grow with powers of the
width up to 2.1, and the best learning rate falls to 0.004, the lowest of the grid. At width 256 the best losses are
2.45 and 2.61 nats a byte.
"""

from dataclasses import replace
from pathlib import Path

from slmjax.config import Evaluation, Experiment
from slmjax.data.recipe import load_recipe
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import Bytes
from slmjax.models.decoder import Decoder
from slmjax.models.families.llama import llama
from slmjax.models.parametrisation import CompleteP
from slmjax.nn.initial import Normal
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Linear

ROOT = Path(__file__).resolve().parents[2]
HEAD = 8


def plain(width: int, layers: int) -> Decoder:
    """Under the standard parametrisation. Initial values have the variance 1 / width of a model of width 32."""
    heads = width // HEAD
    made = llama(
        layers=layers, width=width, heads=heads, kv_heads=heads // 2, head_dim=HEAD, hidden=11 * width // 4, vocab=264,
        context=64, tied=False,
    )  # fmt: skip
    return replace(made, initial=Normal(std=32**-0.5))


def experiment(width: int = 32, layers: int = 2) -> Experiment:
    """Training at this size with the numbers that were tuned on the base, of width 32 and 2 layers."""
    classics = load_recipe(ROOT / "data/recipes/english_classics.py")
    text = replace(classics, name="english_bytes_10", tokenizer=Bytes(), validation=0.1)
    return Experiment(
        name=f"mup-transfer-{width}-{layers}",
        model=CompleteP(base=plain(32, 2)).model(plain(width, layers)),
        data=PackedText(train=(Part(source=text),), length=64, batch=8),
        schedule=Linear(peak_lr=1.6e-2, warmup_steps=20),
        optimizer=AdamW(b2=0.99, weight_decay=0.1),
        steps=200,
        evaluation=Evaluation(every=200, batches=64),
    )
