"""How a CPU computes: the choice as a function of features and timings, its cache, and that a run keeps it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from slmjax.config import Runtime
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import reference_attention, xla_attention
from slmjax.nn.compute import Compute, einsum, for_backend, for_cpu
from slmjax.nn.einsum_cpu import cpu_einsum
from slmjax.nn.processor import Processor
from slmjax.runs import peak, probe, same_compute
from slmjax.runs.probe import Verdict, choose, precisions, read, undisturbed, verdict
from slmjax.runs.same_compute import choice_of, record, recorded
from slmjax.runs.same_compute import settle as chosen
from slmjax.train import processes

pytestmark = pytest.mark.fast

OLD = Processor(name="old", features=("avx", "avx2", "fma"), cores=2)
NEW = Processor(name="new", features=("avx", "avx2", "fma", "avx512f", "avx512_bf16"), cores=2)


def forms(products=1.0, plain=2.0, attention=1.0, reference=2.0, xla=2.0):
    return {
        "cpu_einsum": products,
        "einsum": plain,
        "cpu_attention": attention,
        "reference_attention": reference,
        "xla_attention": xla,
    }


def test_precisions_follow_from_the_features():
    assert precisions(OLD) == ("float32",)
    assert precisions(NEW) == ("bfloat16", "float32")
    assert precisions(replace(OLD, features=())) == ("bfloat16", "float32"), "unknown: measure both"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": forms()}, for_cpu("float32")),
        ({"bfloat16": forms(), "float32": forms(products=2)}, for_cpu("bfloat16")),
        ({"bfloat16": forms(products=2), "float32": forms()}, for_cpu("float32")),
        # The fastest form of each part counts, whichever it is.
        (
            {"bfloat16": forms(9, 0.5, 9, 0.5), "float32": forms()},
            for_cpu("bfloat16", einsum=einsum, attention=reference_attention),
        ),
        ({"float32": forms(xla=0.9, reference=0.94)}, for_cpu("float32", attention=xla_attention)),
        # What a repetition might turn round decides nothing.
        ({"bfloat16": forms(1.02), "float32": forms()}, for_cpu("bfloat16")),
        ({"float32": forms(plain=0.96, xla=0.97)}, for_cpu("float32")),
    ],
)
def test_the_choice_is_a_function_of_what_was_measured(seconds, expected):
    assert choose(seconds) == expected


def test_a_precision_that_the_user_names_gets_its_own_fastest_forms():
    seconds = {"bfloat16": forms(), "float32": forms(products=9, plain=8)}
    assert choose(seconds) == for_cpu("bfloat16")
    assert choose(seconds, "float32") == for_cpu("float32", einsum=einsum)
    assert choose({"float32": forms()}, "bfloat16") == for_cpu("bfloat16")


def test_a_busy_machine_is_judged_by_its_work():
    elapsed, work = {"a": 1.0, "b": 3.0}, {"a": 1.9, "b": 4.0}
    assert undisturbed(elapsed, work) is elapsed
    assert undisturbed({**elapsed, "b": 40.0}, work) is work


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A processor of our choosing, and a probe that counts how often it measures."""
    here = SimpleNamespace(processor=NEW, seconds={d: forms() for d in ("bfloat16", "float32")}, measured=0)

    def measure(dtypes):
        here.measured += 1
        return {d: here.seconds[d] for d in dtypes}

    monkeypatch.delenv(probe.SWITCH)
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "processor", lambda: here.processor)
    monkeypatch.setattr(probe, "measure", measure)
    return here


def test_a_machine_is_measured_once(machine, tmp_path, monkeypatch):
    first = verdict()
    machine.seconds = {d: forms(products=9) for d in ("bfloat16", "float32")}
    assert verdict() == first
    assert machine.measured == 1
    machine.processor = OLD
    assert verdict().compute.dtype == "float32"
    machine.processor = replace(NEW, cores=8)
    verdict()
    machine.processor = NEW
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    verdict()
    assert machine.measured == 4, "another processor, other cores, other flags: each is measured for itself"
    assert len(list((tmp_path / "cache" / "cpu").iterdir())) == 4, "and nothing but the measurements is left"


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"seconds": 1}', '{"seconds": {"bfloat16": {}}}', "\x00\xff", '{"seconds": {"bfloat16": null}}'],
)
def test_a_damaged_measurement_is_taken_again(machine, tmp_path, damage):
    verdict()
    (file,) = (tmp_path / "cache" / "cpu").iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert read(file, ("bfloat16", "float32")) is None
    assert verdict().compute == for_cpu("bfloat16")
    assert machine.measured == 2
    assert read(file, ("bfloat16", "float32")) == machine.seconds


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_cannot_be_are_no_measurement(tmp_path, value):
    (tmp_path / "x").write_text(json.dumps({"seconds": {"float32": forms(products=value)}}))
    assert read(tmp_path / "x", ("float32",)) is None


def test_a_cache_that_cannot_be_written_stops_nothing(machine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "file"))
    assert verdict().compute == verdict().compute == for_cpu("bfloat16")
    assert machine.measured == 2


def test_off_means_by_features_alone(machine, monkeypatch):
    monkeypatch.setenv(probe.SWITCH, "off")
    found = verdict()
    assert found.compute == for_backend("cpu")
    assert machine.measured == 0
    assert "not measured" in found.lines()[1]
    assert verdict("gpu") is None


def test_lines_name_features_figures_and_choice():
    seconds = {"float32": forms(products=0.0312, plain=0.2)}
    where, what = Verdict(compute=choose(seconds), processor=OLD, seconds=seconds).lines()
    assert where == "old, 2 cores (avx, avx2, fma)"
    assert what.startswith("fastest: float32, cpu_einsum, cpu_attention, ")
    assert "cpu_einsum 31.2, einsum 200.0" in what


def test_every_form_is_measured_in_every_precision():
    """For real, once each: the programs compile and run. What they take is not looked at."""
    found = probe.measure(("float32",), seconds=0, rounds=1)
    assert {d: set(f) for d, f in found.items()} == {"float32": set(forms())}


def settle(runtime, folder):
    """As `train`, which records the choice once the run can begin."""
    choice = chosen(runtime, folder)
    record(choice, folder)
    return choice


def test_a_run_keeps_what_it_began_with(machine, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    begun = settle(Runtime(), folder)
    assert begun.compute == for_cpu("bfloat16")
    assert str(NEW) in begun.reason
    # The machine is another, or was measured anew: the run goes on as it began.
    machine.processor, machine.seconds = OLD, {"float32": forms(plain=0.1)}
    assert settle(Runtime(), folder).compute == begun.compute
    assert settle(Runtime(dtype="bfloat16"), folder).compute == begun.compute
    # Unless the user says otherwise; the next resume keeps that.
    assert settle(Runtime(dtype="float32"), folder).compute == for_cpu("float32", einsum=einsum)
    assert settle(Runtime(), folder).compute == for_cpu("float32", einsum=einsum)
    mine = Compute(dtype="float32", unroll=2)
    assert settle(Runtime(compute=mine), folder).compute == mine
    assert settle(Runtime(compute=mine, dtype="bfloat16"), folder).compute == replace(mine, dtype="bfloat16")
    assert settle(Runtime(), folder).compute == replace(mine, dtype="bfloat16")


def test_a_record_of_another_device_or_version_is_not_used(machine, tmp_path):
    settle(Runtime(), tmp_path)
    file = tmp_path / same_compute.FILE
    assert recorded(file, "cpu") == for_cpu("bfloat16")
    assert recorded(file, "gpu") is None
    good = file.read_text()
    for old, new in (
        ("einsum_cpu:cpu_einsum", "einsum_cpu:gone"),
        ('"unroll"', '"rolled"'),
        ('"compute": {', '"compute": [{'),
    ):
        file.write_text(good.replace(old, new))
        assert file.read_text() != good
        assert recorded(file, "cpu") is None
    assert choice_of(Runtime(), tmp_path).compute == for_cpu("bfloat16")
    assert recorded(tmp_path / "nothing", "cpu") is None


def test_the_slower_precision_is_done_as_set_and_explained(machine, tmp_path):
    choice = choice_of(Runtime(dtype="float32"), tmp_path)
    assert choice.compute == for_cpu("float32")
    assert "bfloat16 is faster on new" in choice.reason


def test_the_choice_survives_the_broadcast(machine, tmp_path, monkeypatch):
    """Two processes; what the second receives is what the first has sent: a size, then JSON of that size."""
    sent = []

    def broadcast(x):
        sent.append(x)
        return sent[(len(sent) - 1) % 2]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    first = settle(Runtime(), tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    machine.processor = OLD
    assert settle(Runtime(), tmp_path) == first
    assert first.compute.attention is cpu_attention
    assert first.compute.einsum is cpu_einsum
    assert len(sent) == 4
    assert sent[1].shape == sent[3].shape


def test_the_ceiling_is_that_of_the_fastest_product(monkeypatch):
    """With a clock by which a product takes as long as its dtype and shape say."""
    now, took = [0.0], {"bfloat16": 4.0, "float32": 2.0}

    def matmul(a, b):
        now[0] += took[str(a.dtype)] * (0.5 if a.shape[1] == 704 else 1.0) * a.shape[0] * a.shape[1] * b.shape[1]
        return SimpleNamespace(block_until_ready=lambda: None)

    monkeypatch.setattr(jax, "jit", lambda f: matmul)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(peak.time, "monotonic", lambda: now[0])
    assert peak.measured_flops("bfloat16", 0.1) == pytest.approx(2 / (2.0 * 0.5)), "float32 was faster here"
    took["bfloat16"] = 1.0
    assert peak.measured_flops("bfloat16", 0.1) == pytest.approx(2 / (1.0 * 0.5))
    assert peak.measured_flops("float32", 0.1) == pytest.approx(2 / (2.0 * 0.5))


def test_the_ceiling_is_at_least_as_fast_as_the_kernel_of_the_run():
    """A kernel that computes nothing is faster than any product: the ceiling is then that of the kernel."""

    def nothing(equation, x, w):
        return jax.numpy.zeros((*x.shape[:2], w.shape[1]), x.dtype) + x[0, 0, 0] * w[0, 0]

    assert peak.measured_flops("float32", 0.0, nothing) > 2 * peak.measured_flops("float32", 0.0)
