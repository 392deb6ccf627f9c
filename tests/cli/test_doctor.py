"""doctor's memory against what XLA allocates, its one change against itself, its speed against a clock."""

from dataclasses import replace

import jax
import pytest
from running import slmjax

from slmjax.cli.doctor import take_memory
from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.errors import UserError
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.models.flops import nonembedding_count
from slmjax.nn.compute import Compute, Remat, for_backend
from slmjax.nn.processor import processor
from slmjax.objectives import NextToken
from slmjax.optim.schedules import Cosine
from slmjax.runs.estimate_memory import batch_of, estimate, one_change
from slmjax.runs.estimate_time import calibrate, products
from slmjax.train.sharding import Mesh
from slmjax.train.step import program

ALONE = {"data": 1, "fsdp": 1, "tensor": 1}
LLAMA = llama(layers=4, width=128, heads=4, kv_heads=2, hidden=352, vocab=1000, context=256)
GPT2 = gpt2(layers=3, width=96, heads=4, vocab=600, context=256)


def experiment(model=LLAMA, batch=8, length=128, **changes) -> Experiment:
    return Experiment(
        name="x",
        model=model,
        data=PackedText(train=(Part(source="nowhere"),), batch=batch, length=length),
        schedule=Cosine(peak_lr=1e-3, warmup_steps=1),
        steps=10,
        **changes,
    )


def allocated(e: Experiment, compute: Compute) -> int:
    """Bytes of the compiled step: arguments, results that reuse none of them, and temporaries."""
    model, schedule = e.model.build(compute), e.schedule.build(e.steps)
    made = program(
        model.init,
        model.axes,
        e.objective.build(model),
        e.optimizer.build(schedule, model.axes),
        e.view.build(model.axes),
        mesh=Mesh(data=1).build(jax.devices()[:1]),
        accumulate=e.accumulate,
        micro_tokens=compute.micro_tokens(e.model.width),
        guard=e.guard,
    )
    batch = batch_of(e.data, e.data.batch)
    m = made.step.lower(made.abstract, (), batch).compile().memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


@pytest.mark.parametrize(
    ("e", "compute"),
    [
        (experiment(), Compute()),
        (experiment(), Compute(remat=Remat())),
        (experiment(accumulate=4), Compute()),
        (experiment(), Compute(micro_size=experiment().data.length * experiment().model.width)),
        (experiment(GPT2), Compute(dtype="bfloat16")),
        (experiment(batch=16, length=64, objective=NextToken(chunk=16)), Compute(unroll=None)),
    ],
    ids=["plain", "remat", "accumulate", "micro", "gpt2-bf16", "chunked-unrolled"],
)
def test_memory_is_within_a_quarter_of_what_xla_allocates(e, compute):
    assert estimate(e, compute, ALONE).total == pytest.approx(allocated(e, compute), rel=0.25)


def test_what_saves_memory_is_seen_to_save_it():
    plain = estimate(experiment(), Compute(), ALONE)
    assert estimate(experiment(), Compute(remat=Remat()), ALONE).activations < 0.5 * plain.activations
    assert estimate(experiment(accumulate=4), Compute(), ALONE).activations < 0.4 * plain.activations
    micro = Compute(micro_size=2 * experiment().data.length * experiment().model.width)
    assert estimate(experiment(), micro, ALONE) == estimate(experiment(accumulate=4), Compute(), ALONE)
    assert estimate(experiment(), Compute(dtype="bfloat16"), ALONE).activations < 0.9 * plain.activations
    split = estimate(experiment(), Compute(), {"data": 1, "fsdp": 4, "tensor": 1})
    assert split.params < 0.3 * plain.params
    assert split.activations < 0.4 * plain.activations


def test_the_one_change_is_the_mildest_that_fits():
    e, compute = experiment(), Compute()
    full, halved = estimate(e, compute, ALONE).total, estimate(replace(e, accumulate=2), compute, ALONE).total
    change = one_change(e, compute, ALONE, limit=(full + halved) / 2)
    assert change.setting == "--accumulate 2"
    assert change.memory.total == halved
    one_row = experiment(batch=1)
    change = one_change(one_row, compute, ALONE, limit=0.8 * estimate(one_row, compute, ALONE).total)
    assert change.setting == "runtime.compute.remat = Remat()"
    wide = experiment(length=16)
    four = {"data": 4, "fsdp": 1, "tensor": 1}
    change = one_change(wide, compute, four, limit=0.7 * estimate(wide, compute, four).total)
    assert change.setting == "--runtime.mesh.data 1 --runtime.mesh.fsdp 4"
    assert one_change(e, compute, ALONE, limit=estimate(e, compute, ALONE).params) is None


def test_calibration_counts_every_matrix_product():
    for model in (LLAMA, GPT2):
        inside = sum(n * m for n, m in products(model)[1:]) * model.repeats
        vectors = nonembedding_count(model) - inside
        assert 0 < vectors < 0.05 * inside
    speed = calibrate(LLAMA, "float32", 256, seconds=0.1)
    assert speed.flops > 1e8
    assert speed.tokens_per_second(1e6) == pytest.approx(speed.flops * speed.efficiency / 1e6)


def test_verdicts(tiny):
    fits = slmjax("doctor", tiny.file, "--runtime.mesh.data", "8")
    assert fits.code == 0, fits.err
    assert "verdict: fits" in fits.out
    assert "tokens/s" in fits.out
    assert "kWh (estimate" in fits.out
    assert processor().name in fits.out
    chosen = for_backend("cpu")
    assert f"fastest: {chosen.dtype}, cpu_einsum, cpu_attention" in fits.out
    assert f"{chosen.dtype}, chosen for {processor().name}" in fits.out
    asked = slmjax("doctor", tiny.file, "--runtime.mesh.data", "8", "--runtime.dtype", "float32")
    assert "float32, as runtime.dtype says" in asked.out
    mesh = ("--runtime.mesh.data", "1", "--runtime.mesh.fsdp", "8")
    cannot = slmjax("doctor", tiny.file, *mesh, "--memory-gb", "0.00001")
    assert cannot.code == 2
    assert "no single setting is enough" in cannot.out


@pytest.mark.fast
def test_memory_argument():
    assert take_memory(["x.py", "--memory-gb", "8", "--steps", "3"]) == (8.0, ["x.py", "--steps", "3"])
    assert take_memory(["x.py", "--memory-gb=0.5"]) == (0.5, ["x.py"])
    with pytest.raises(UserError, match="--memory-gb is 'lots'"):
        take_memory(["--memory-gb", "lots"])
