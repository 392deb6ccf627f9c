"""The metrics of one training step, written down: a change of any number anywhere in the step is noticed."""

import json
import pathlib

import jax
import numpy as np
import pytest
from contract.test_one_step import packed

from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Cosine
from slmjax.train.state import init_state
from slmjax.train.step import SKIP, make_step
from slmjax.views import EMA

pytestmark = pytest.mark.fast

FILE = pathlib.Path(__file__).with_name("golden.json")
DECODERS = {
    "llama": llama(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=97, context=64),
    "gpt2": gpt2(layers=2, width=32, heads=4, vocab=97, context=64),
}


def metrics_of(decoder):
    model = decoder.build(Compute(dtype="float32"))
    schedule = Cosine(peak_lr=3e-3, warmup_steps=2).build(10)
    optimizer, view = AdamW().build(schedule, model.axes), EMA(decay=0.9).build(model.axes)
    key = jax.random.key(0)
    step = jax.jit(make_step(NextToken(z_loss=1e-4).build(model), optimizer, view, key, schedule=schedule))
    state = init_state(model.init, optimizer, view, SKIP, key)
    batch = jax.tree.map(jax.numpy.asarray, packed(decoder.vocab))
    rows = []
    for _ in range(2):
        state, metrics = step(state, (), batch)
        rows.append({name: float(x) for name, x in sorted(metrics.items())})
    return rows


@pytest.mark.parametrize("name", DECODERS)
def test_two_steps_give_the_metrics_written_down(name):
    found = metrics_of(DECODERS[name])
    wanted = json.loads(FILE.read_text())[name]
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.keys() == b.keys()
        for metric, x in a.items():
            assert np.isclose(x, b[metric], rtol=1e-4, atol=1e-6), (
                f"step {step}: {metric} is {x!r}, was {b[metric]!r}. If you meant to change initial values, the loss, "
                "the optimizer or a metric, say so in CHANGELOG.md and run `python -m contract.test_golden` in tests/; "
                "if you did not, you have found a bug"
            )


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: metrics_of(d) for name, d in DECODERS.items()}, indent=1) + "\n")
